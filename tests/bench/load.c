/* The load generator of the benchmarks: a closed loop over keep-alive connections, one thread, epoll.
 *
 *   load PORT CONNECTIONS SECONDS COUNT MARKER REQUEST-FILE [POLL-FILE]
 *
 * Each connection sends the request (the file's bytes as they are), reads the answer whole, and goes on. Nothing is
 * sent after SECONDS, or (COUNT > 0) beyond COUNT requests; what is under way is read to its end, within GRACE_S. An
 * answer is right when its status is 200 and its body holds MARKER. With a poll file, each right answer is followed by
 * that request, in which 36 '@' stand for the answer's x-bf-async-id, until the answer to it holds
 * x-bf-async-status: completed and MARKER (the first answer is right without it); both together count as one.
 *
 * Prints one line of JSON; the exit code is 1 when any answer was wrong, which is then on standard error.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 1 << 20, READY = 256, MAX_SAMPLES = 1 << 22, ID_BYTES = 36, GRACE_S = 30 };

struct conn {
    int fd;
    int polls;          /* the request under way is a poll */
    long sent_at;       /* of the first request of the pair */
    char *request;
    size_t request_length;
    char *in;           /* the head, then the body as it is decoded */
    size_t in_length;
    size_t head_length; /* 0: the head is not here yet */
    size_t body_end;    /* end of the decoded body in `in` */
    long body_left;     /* of a body with a length; of the chunk under way */
    int chunked, keep, status;
    long answered;
    char *scratch;      /* raw bytes of a chunked body, not decoded yet */
    size_t scratch_length;
};

static struct sockaddr_in server = {.sin_family = AF_INET};
static int poller, active;
static char *request_bytes, *poll_bytes;
static size_t request_length, poll_length;
static const char *marker;
static long deadline, budget;
static long answers, events, chunks, polls, failures, reconnects, bytes_in;
static unsigned *samples;
static size_t sample_count;

static void start_request(struct conn *c);

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(2);
}

static char *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    char *data = calloc(1, BUFFER);
    *length = fread(data, 1, BUFFER - 1, file);
    fclose(file);
    return data;
}

static void end_conn(struct conn *c) {
    close(c->fd);
    c->fd = -1;
    active--;
}

static void fail(struct conn *c, const char *why) {
    if (!failures++)
        fprintf(stderr, "wrong answer: %s, status %d: %.*s\n", why, c->status,
                (int)(c->in_length < 2000 ? c->in_length : 2000), c->in);
    end_conn(c);
}

static void open_conn(struct conn *c) {
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0) die("socket");
    while (connect(c->fd, (void *)&server, sizeof server))
        if (errno != EINTR) die("connect");
    int on = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
    c->answered = 0;
}

static void send_request(struct conn *c) {
    size_t left = c->request_length;
    char *at = c->request;
    while (left) { /* the socket blocks; requests are small */
        ssize_t n = send(c->fd, at, left, MSG_NOSIGNAL);
        if (n < 0) {
            fail(c, "the server hung up before the request was sent");
            return;
        }
        at += n;
        left -= n;
    }
    c->in_length = c->head_length = c->body_end = c->scratch_length = 0;
    c->status = 0;
}

static void start_request(struct conn *c) {
    long now = now_ns();
    if (now >= deadline || budget == 0) {
        end_conn(c);
        return;
    }
    budget--;
    memcpy(c->request, request_bytes, request_length);
    c->request_length = request_length;
    c->polls = 0;
    c->sent_at = now;
    send_request(c);
}

static char *field(struct conn *c, const char *name) { /* "\r\nname:" */
    char end = c->in[c->head_length - 1];
    c->in[c->head_length - 1] = 0;
    char *found = strcasestr(c->in, name);
    c->in[c->head_length - 1] = end;
    if (!found) return NULL;
    found += strlen(name);
    while (*found == ' ') found++;
    return found;
}

static int holds(struct conn *c, const char *text) {
    return memmem(c->in + c->head_length, c->body_end - c->head_length, text, strlen(text)) != NULL;
}

static void count_events(struct conn *c) {
    char *at = c->in + c->head_length, *end = c->in + c->body_end;
    while ((at = memmem(at, end - at, "event: ", 7)) != NULL) {
        events++;
        at += 7;
    }
}

static void send_poll(struct conn *c, const char *id) {
    memcpy(c->request, poll_bytes, poll_length);
    char *hole = memmem(c->request, poll_length, "@@@@@@", 6);
    if (hole && id) memcpy(hole, id, ID_BYTES);
    c->request_length = poll_length;
    c->polls = 1;
    polls++;
    send_request(c);
}

static void answered(struct conn *c) {
    if (c->status != 200) {
        fail(c, "not 200");
        return;
    }
    c->answered++;
    if (poll_bytes) {
        char *status = field(c, "\r\nx-bf-async-status:"), *id = field(c, "\r\nx-bf-async-id:");
        if (!status || !id) {
            fail(c, "no job");
            return;
        }
        if (!c->polls || strncmp(status, "completed", 9)) {
            char copy[ID_BYTES];
            memcpy(copy, id, ID_BYTES);
            send_poll(c, copy);
            return;
        }
    }
    if (!holds(c, marker)) {
        fail(c, "incomplete");
        return;
    }
    answers++;
    count_events(c);
    if (sample_count < MAX_SAMPLES) samples[sample_count++] = (now_ns() - c->sent_at) / 1000;
    if (!c->keep) {
        close(c->fd);
        reconnects++;
        open_conn(c);
    }
    start_request(c);
}

static int parse_head(struct conn *c) {
    char *end = memmem(c->in, c->in_length, "\r\n\r\n", 4);
    if (!end) return 0;
    c->head_length = end + 4 - c->in;
    c->body_end = c->head_length;
    c->status = c->in_length > 12 ? atoi(c->in + 9) : 0;
    char *coding = field(c, "\r\ntransfer-encoding:"), *length = field(c, "\r\ncontent-length:");
    char *connection = field(c, "\r\nconnection:");
    c->keep = !(connection && !strncasecmp(connection, "close", 5));
    c->chunked = coding && !strncasecmp(coding, "chunked", 7);
    c->body_left = c->chunked ? -1 : length ? atol(length) : 0;
    return 1;
}

/* Decodes the chunks that came; returns 1 at the last one. */
static int decode(struct conn *c) {
    char *at = c->scratch, *end = c->scratch + c->scratch_length;
    int done = 0;
    while (at < end) {
        if (c->body_left < 0) {
            char *line = memmem(at, end - at, "\r\n", 2);
            if (!line) break;
            long size = strtol(at, NULL, 16);
            if (size == 0) {
                if (end - line < 4) break;
                done = 1;
                break;
            }
            c->body_left = size + 2;
            chunks++;
            at = line + 2;
        }
        long n = end - at < c->body_left ? end - at : c->body_left;
        long data = c->body_left > 2 ? (n < c->body_left - 2 ? n : c->body_left - 2) : 0;
        memcpy(c->in + c->body_end, at, data);
        c->body_end += data;
        at += n;
        c->body_left -= n;
        if (c->body_left == 0) c->body_left = -1;
    }
    c->scratch_length = end - at;
    memmove(c->scratch, at, c->scratch_length);
    return done;
}

static void receive(struct conn *c) {
    char *into = c->head_length && c->chunked ? c->scratch + c->scratch_length : c->in + c->in_length;
    size_t used = c->head_length && c->chunked ? c->scratch_length : c->in_length;
    ssize_t n = recv(c->fd, into, BUFFER - 1 - used, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        fail(c, "the server hung up");
        return;
    }
    bytes_in += n;
    if (!c->head_length) {
        c->in_length += n;
        if (!parse_head(c)) return;
        if (c->chunked) {
            c->scratch_length = c->in_length - c->head_length;
            memcpy(c->scratch, c->in + c->head_length, c->scratch_length);
            c->in_length = c->head_length;
        } else {
            c->body_end = c->in_length;
        }
    } else if (c->chunked) {
        c->scratch_length += n;
    } else {
        c->in_length += n;
        c->body_end = c->in_length;
    }
    int done = c->chunked ? decode(c) : (long)(c->body_end - c->head_length) >= c->body_left;
    if (c->chunked) c->in_length = c->body_end;
    if (done) answered(c);
}

static int compare(const void *a, const void *b) {
    unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;
    return (x > y) - (x < y);
}

static double percentile(double share) {
    return sample_count ? samples[(size_t)((sample_count - 1) * share)] : 0;
}

int main(int argc, char **argv) {
    if (argc < 7) {
        fprintf(stderr, "usage: load PORT CONNECTIONS SECONDS COUNT MARKER REQUEST-FILE [POLL-FILE]\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    server.sin_port = htons(atoi(argv[1]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int connections = atoi(argv[2]);
    double seconds = atof(argv[3]);
    budget = atol(argv[4]) > 0 ? atol(argv[4]) : -1;
    marker = argv[5];
    request_bytes = read_file(argv[6], &request_length);
    if (argc > 7) poll_bytes = read_file(argv[7], &poll_length);
    samples = malloc(sizeof *samples * MAX_SAMPLES);
    poller = epoll_create1(0);
    long began = now_ns();
    deadline = began + (long)(seconds * 1e9);
    struct conn *all = calloc(connections, sizeof *all);
    size_t request_room = request_length > poll_length ? request_length : poll_length;
    active = connections;
    for (int i = 0; i < connections; i++) {
        all[i].in = malloc(BUFFER);
        all[i].scratch = malloc(BUFFER);
        all[i].request = malloc(request_room + 1);
        open_conn(&all[i]);
        start_request(&all[i]);
    }
    long limit = deadline + GRACE_S * 1000000000L;
    struct epoll_event ready[READY];
    while (active > 0 && now_ns() < limit) {
        int count = epoll_wait(poller, ready, READY, 1000);
        for (int i = 0; i < count; i++) {
            struct conn *c = ready[i].data.ptr;
            if (c->fd >= 0) receive(c);
        }
    }
    double took = (now_ns() - began) / 1e9;
    if (active > 0) {
        fprintf(stderr, "%d answers did not end within %d s\n", active, GRACE_S);
        failures += active;
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    qsort(samples, sample_count, sizeof *samples, compare);
    printf("{\"answers\": %ld, \"events\": %ld, \"chunks\": %ld, \"polls\": %ld, \"failures\": %ld, \"reconnects\": %ld, "
           "\"bytes\": %ld, \"seconds\": %.6f, \"cpu_s\": %.6f, \"p50_us\": %.0f, \"p99_us\": %.0f}\n",
           answers, events, chunks, polls, failures, reconnects, bytes_in, took, cpu, percentile(0.5), percentile(0.99));
    return failures ? 1 : 0;
}
