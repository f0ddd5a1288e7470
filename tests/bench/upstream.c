/* The mock upstream of the benchmarks: the Messages API with fixed answers, HTTP/1.1, one thread, epoll.
 *
 *   upstream            listens on a free port of 127.0.0.1, prints "port N", serves until it is killed
 *
 * POST /v1/messages answers with a Message of 600 bytes or, with "stream":true in the body, with 69 events, each a
 * chunk of its own. How the events come is said by how the model's name begins:
 *
 *   (any other)  flood: all in one write
 *   paced        64 deltas, one every 20 ms
 *   held         the first three events; the rest at POST /release
 *   gate         nothing but the head; everything at POST /release
 *
 * POST /release ends what is held. GET /stats: {"requests": N, "held": N}.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { DELTAS = 64, EVENTS = DELTAS + 5, MESSAGE_BYTES = 600, MAX_FD = 65536, READY = 512 };
enum { IN_BYTES = 65536, LISTEN_BACKLOG = 4096 };
static const long PACE_NS = 20 * 1000 * 1000;

/* Head, 69 chunks and the last chunk, end to end, so that any run of events is one write. */
static char stream_bytes[32768];
static size_t mark[EVENTS + 1], stream_length, head_length; /* mark[i]: where event i starts */
static char plain_bytes[2048];
static size_t plain_length;

struct conn {
    int fd;
    char *in;
    size_t in_length;
    const char *out; /* what is left of the write under way */
    size_t out_length;
    int next;        /* the next event of a paced or held stream; -1: none is under way */
    long due;        /* when it is to be sent; 0: at a release */
};
static struct conn *conns[MAX_FD];
static int poller;
static long requests;

/* Every wait is as long as every other, so the order of coming is the order of leaving. */
static struct { int fd; long due; } queue[MAX_FD * 2];
static size_t queue_first, queue_last;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void add_event(int index, const char *name, const char *format, ...) {
    char data[1024], event[1200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(data, sizeof data, format, arguments);
    va_end(arguments);
    int length = snprintf(event, sizeof event, "event: %s\ndata: %s\n\n", name, data);
    mark[index] = stream_length;
    stream_length += sprintf(stream_bytes + stream_length, "%x\r\n%s\r\n", length, event);
}

static void build_answers(void) {
    stream_length = head_length = sprintf(stream_bytes,
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        "request-id: req_mock\r\ntransfer-encoding: chunked\r\n\r\n");
    add_event(0, "message_start",
        "{\"type\":\"message_start\",\"message\":{\"id\":\"msg_mock\",\"type\":\"message\",\"role\":\"assistant\","
        "\"model\":\"mock\",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,"
        "\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}");
    add_event(1, "content_block_start",
        "{\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}");
    for (int i = 0; i < DELTAS; i++)
        add_event(2 + i, "content_block_delta",
            "{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\" word%02d\"}}", i);
    add_event(DELTAS + 2, "content_block_stop", "{\"type\":\"content_block_stop\",\"index\":0}");
    add_event(DELTAS + 3, "message_delta",
        "{\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\",\"stop_sequence\":null},"
        "\"usage\":{\"output_tokens\":64}}");
    add_event(DELTAS + 4, "message_stop", "{\"type\":\"message_stop\"}");
    mark[EVENTS] = stream_length;
    stream_length += sprintf(stream_bytes + stream_length, "0\r\n\r\n");

    const char *before = "{\"id\":\"msg_mock\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"mock\","
        "\"content\":[{\"type\":\"text\",\"text\":\"";
    const char *after = "\"}],\"stop_reason\":\"end_turn\",\"stop_sequence\":null,"
        "\"usage\":{\"input_tokens\":25,\"output_tokens\":64}}";
    plain_length = sprintf(plain_bytes,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nrequest-id: req_mock\r\ncontent-length: %d\r\n\r\n%s",
        MESSAGE_BYTES, before);
    size_t text = MESSAGE_BYTES - strlen(before) - strlen(after);
    for (size_t i = 0; i < text; i++) plain_bytes[plain_length++] = "a word "[i % 7];
    plain_length += sprintf(plain_bytes + plain_length, "%s", after);
}

static void close_conn(struct conn *c) {
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c);
}

/* Returns 0 when the connection is gone. Whatever is sent lives as long as the process does. */
static int flush_out(struct conn *c) {
    while (c->out_length) {
        ssize_t n = send(c->fd, c->out, c->out_length, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) return 1;
        if (n < 0) {
            close_conn(c);
            return 0;
        }
        c->out += n;
        c->out_length -= n;
    }
    return 1;
}

static int put(struct conn *c, const char *data, size_t length) {
    if (c->out_length) { /* only runs of the one stream follow each other, and those are end to end */
        c->out_length += length;
        return 1;
    }
    c->out = data;
    c->out_length = length;
    return flush_out(c);
}

static void pace(struct conn *c, long due) {
    c->due = due;
    size_t slot = queue_last++ % (sizeof queue / sizeof *queue);
    queue[slot].fd = c->fd;
    queue[slot].due = due;
}

static int finish(struct conn *c) {
    size_t from = c->next == 0 ? head_length : mark[c->next];
    c->next = -1;
    c->due = 0;
    return put(c, stream_bytes + from, stream_length - from);
}

static void run_paced(long now) {
    while (queue_first != queue_last) {
        size_t slot = queue_first % (sizeof queue / sizeof *queue);
        if (queue[slot].due > now) return;
        queue_first++;
        struct conn *c = conns[queue[slot].fd];
        if (c == NULL || c->due != queue[slot].due) continue; /* closed meanwhile */
        if (c->next == DELTAS + 1) {
            finish(c);
            continue;
        }
        int at = c->next++;
        if (put(c, stream_bytes + mark[at], mark[at + 1] - mark[at])) pace(c, c->due + PACE_NS);
    }
}

static int release(void) {
    int released = 0;
    for (int fd = 0; fd < MAX_FD; fd++)
        if (conns[fd] && conns[fd]->next >= 0 && conns[fd]->due == 0) released += finish(conns[fd]);
    return released;
}

static int put_text(struct conn *c, const char *format, ...) {
    static char text[512];
    char body[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(body, sizeof body, format, arguments);
    va_end(arguments);
    int length = sprintf(text, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                         strlen(body), body);
    return put(c, text, length);
}

static int has(const char *body, size_t length, const char *text) {
    return memmem(body, length, text, strlen(text)) != NULL;
}

static int answer(struct conn *c, const char *body, size_t length) {
    if (!strncmp(c->in, "POST /release", 13)) return put_text(c, "{\"released\": %d}", release());
    if (!strncmp(c->in, "GET /stats", 10)) {
        int held = 0;
        for (int fd = 0; fd < MAX_FD; fd++) held += conns[fd] && conns[fd]->next >= 0;
        return put_text(c, "{\"requests\": %ld, \"held\": %d}", requests, held);
    }
    requests++;
    if (!has(body, length, "\"stream\":true") && !has(body, length, "\"stream\": true"))
        return put(c, plain_bytes, plain_length);
    if (has(body, length, "\"model\":\"gate") || has(body, length, "\"model\": \"gate")) {
        c->next = 0;
        return put(c, stream_bytes, head_length);
    }
    if (has(body, length, "\"model\":\"held") || has(body, length, "\"model\": \"held")) {
        c->next = 3;
        return put(c, stream_bytes, mark[3]);
    }
    if (has(body, length, "\"model\":\"paced") || has(body, length, "\"model\": \"paced")) {
        c->next = 2;
        if (!put(c, stream_bytes, mark[2])) return 0;
        pace(c, now_ns() + PACE_NS);
        return 1;
    }
    return put(c, stream_bytes, stream_length);
}

/* Answers what has come in full. Returns 0 when the connection is gone. */
static int serve(struct conn *c) {
    for (;;) {
        c->in[c->in_length] = 0;
        char *end = memmem(c->in, c->in_length, "\r\n\r\n", 4);
        if (end == NULL) return 1;
        size_t head = end + 4 - c->in, body = 0;
        char *found = strcasestr(c->in, "\r\ncontent-length:");
        if (found && found < end) body = strtoul(found + 17, NULL, 10);
        if (c->in_length < head + body) return 1;
        if (!answer(c, c->in + head, body)) return 0;
        c->in_length -= head + body;
        memmove(c->in, c->in + head + body, c->in_length);
    }
}

static void receive(struct conn *c) {
    for (;;) {
        ssize_t n = recv(c->fd, c->in + c->in_length, IN_BYTES - c->in_length, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            close_conn(c);
            return;
        }
        c->in_length += n;
        if (!serve(c)) return;
    }
}

static void accept_all(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_FD) {
            close(fd);
            continue;
        }
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct conn *c = calloc(1, sizeof *c);
        if (c == NULL || (c->in = malloc(IN_BYTES + 1)) == NULL) die("malloc");
        c->fd = fd;
        c->next = -1;
        conns[fd] = c;
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.fd = fd};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
    }
}

static int open_listener(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (void *)&address, length) || listen(fd, LISTEN_BACKLOG)) die("listen");
    if (getsockname(fd, (void *)&address, &length)) die("getsockname");
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(void) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    build_answers();
    poller = epoll_create1(0);
    int listener = open_listener();
    struct epoll_event ready[READY], event = {.events = EPOLLIN, .data.fd = listener};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event)) die("epoll_ctl");
    for (;;) {
        int wait_ms = -1;
        if (queue_first != queue_last) {
            long left = queue[queue_first % (sizeof queue / sizeof *queue)].due - now_ns();
            wait_ms = left <= 0 ? 0 : (int)((left + 999999) / 1000000);
        }
        int count = epoll_wait(poller, ready, READY, wait_ms);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) {
                accept_all(listener);
                continue;
            }
            struct conn *c = conns[fd];
            if (c == NULL) continue;
            if (ready[i].events & EPOLLOUT && !flush_out(c)) continue;
            receive(c);
        }
        run_paced(now_ns());
    }
}
