"""Telling others how jobs end: signed calls to endpoints the operator named."""
