"""The page at ``/docs``: the document as plain HTML, which Swagger UI then replaces where it can be loaded.

Swagger UI comes from a public CDN, pinned to one release by its digest (Subresource Integrity): a browser
runs exactly those bytes or nothing, and without a way to the CDN the plain page remains. No wheel of a good
size ships a release that knows OpenAPI 3.1 (5.0 is the first), hence the CDN.
"""

import re
from dataclasses import dataclass
from html import escape

_CODE = re.compile(r"`([^`]+)`")


def with_code(text: str) -> str:
    """A description, which is CommonMark, as HTML: escaped, its code spans marked up, all else as it is."""
    return _CODE.sub(r"<code>\1</code>", escape(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class SwaggerUI:
    """A release of Swagger UI, by where it is and what it is."""

    folder: str
    script_integrity: str
    style_integrity: str

    @property
    def script_url(self) -> str:
        """The program."""
        return f"{self.folder}/swagger-ui-bundle.js"

    @property
    def style_url(self) -> str:
        """Its style sheet."""
        return f"{self.folder}/swagger-ui.css"


SWAGGER_UI = SwaggerUI(
    folder="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.29.0",
    # openssl dgst -sha384 -binary FILE | base64, of the files of the release.
    script_integrity="sha384-fU7N0ipr7Rsi0J81QNqlN7WXb/tyAL8b16lEAJ2a01m7wdX+RU61ggqmxn8p3aJb",
    style_integrity="sha384-++DMKo1369T5pxDNqojF1F91bYxYiT1N7b1M15a7oCzEodfljztKlApQoH6eQSKI",
)

SCRIPT = """
if (window.SwaggerUIBundle) {
  SwaggerUIBundle({
    dom_id: "#reference",
    url: "openapi.json",
    deepLinking: true,
    presets: [SwaggerUIBundle.presets.apis],
    layout: "BaseLayout"
  });
}
"""
"""Starts Swagger UI. The address is relative, so that it also works below ``/anthropic``."""

PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>{{ document.info.title }} {{ document.info.version }}</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="{{ ui.style_url }}" integrity="{{ ui.style_integrity }}"
    crossorigin="anonymous">
  <style>
    .plain { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
    .plain h3 { font-family: monospace; margin: 2rem 0 0; }
    .plain p { margin: 0.3rem 0; }
    .plain td { padding-right: 1.5rem; vertical-align: top; }
  </style>
</head>
<body>
<div id="reference"><div class="plain">
  <h1>{{ document.info.title }} {{ document.info.version }}</h1>
  <p>{{ document.info.summary }}</p>
  <p>{{ with_code(document.info.description | default("")) | safe }}</p>
  <p><a href="openapi.json">openapi.json</a> is the machine-readable form of this page.</p>
  {% for tag in document.tags %}
  <h2>{{ tag.name }}</h2>
  <p>{{ tag.description }}</p>
  {% for path, methods in document.paths.items() %}{% for method, operation in methods.items() %}
  {% if tag.name in operation.tags %}
  <h3 id="{{ operation.operationId }}">{{ method | upper }} {{ path }}</h3>
  <p><strong>{{ operation.summary }}.</strong> {{ with_code(operation.description | default("")) | safe }}</p>
  {% if operation.parameters %}
  <table>
    {% for parameter in operation.parameters %}
    <tr><td><code>{{ parameter.name }}</code></td><td>{{ parameter.in }}</td>
      <td>{{ with_code(parameter.description | default("")) | safe }}</td></tr>
    {% endfor %}
  </table>
  {% endif %}
  <p>Answers: {% for status, response in operation.responses.items() -%}
    <code>{{ status }}</code>{% if response.content %} ({{ response.content | join(", ") }}){% endif %}
  {%- if not loop.last %}, {% endif %}{% endfor %}</p>
  {% endif %}
  {% endfor %}{% endfor %}
  {% endfor %}
</div></div>
<script src="{{ ui.script_url }}" integrity="{{ ui.script_integrity }}" crossorigin="anonymous"></script>
<script>{{ script | safe }}</script>
</body>
</html>
"""
