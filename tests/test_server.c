/* The server when its device fails or hangs. Each test forks a process that serves with an engine whose backend is
 * wrapped: the step with a given number fails or never ends. The parent is the client. */
#include "testing.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/serve_options.c" /* how `orcd serve` and `orcd worker` end: part of the program, not of the library */
#include "engine/internal.h"

#define MODEL "models/fable.gguf"
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SLOW 8
#else
#define SLOW 1
#endif

/* ---- the process that serves ---- */

typedef enum fault { FAULT_DEVICE, FAULT_PAUSE, FAULT_HANG } fault;

static struct {
    be_ops ops;
    const be_ops *sound;
    fault fault;
    int at_step, n_step;
} device;

static orcd_status step_end(be_step *s, orcd_error *err) {
    ORCD_TRY(device.sound->step_end(s, err));
    device.n_step++;
    if (device.n_step == device.at_step && device.fault == FAULT_PAUSE)
        sleep(4);
    if (device.n_step >= device.at_step && device.fault == FAULT_HANG)
        sleep(3600);
    if (device.n_step >= device.at_step && device.fault == FAULT_DEVICE)
        return orcd_fail(err, ORCD_ERR_DEVICE, "injected: an illegal address was read");
    return ORCD_OK;
}

static void serve(fault f, int at_step, int report) {
    orcd_error err;
    eng *e;
    server *s;
    const eng_params p = {.model = MODEL, .device = "cpu", .backend.n_threads = 1, .n_ctx = 2048, .max_batch = 2};
    server_block_signals();
    if (eng_open(&p, &e, &err) != ORCD_OK)
        _exit(99);
    device.ops = *e->dev->ops;
    device.sound = e->dev->ops;
    device.fault = f;
    device.at_step = at_step;
    device.ops.step_end = step_end;
    e->dev->ops = &device.ops; /* idle: the queue's lock publishes it */
    const server_params sp = {.engine = e, .model_id = "fable", .host = "127.0.0.1", .drain_s = 0.5};
    if (server_open(&sp, &s, &err) != ORCD_OK)
        _exit(98);
    int port = server_port(s);
    if (write(report, &port, sizeof port) != sizeof port)
        _exit(97);
    _exit(serve_until_end(s, e));
}

typedef struct child {
    pid_t pid;
    int port;
} child;

static child start(fault f, int at_step) {
    child c = {0};
    int report[2];
    assert_int_equal(pipe(report), 0);
    c.pid = fork();
    assert_true(c.pid >= 0);
    if (c.pid == 0) {
        int log = open("/dev/null", O_WRONLY);
        dup2(log, STDERR_FILENO);
        serve(f, at_step, report[1]);
    }
    close(report[1]);
    assert_int_equal(read(report[0], &c.port, sizeof c.port), sizeof c.port);
    close(report[0]);
    return c;
}

/* Its exit code, or -1 when it is still there after so many seconds. */
static int exit_code(child c, double seconds) {
    int status;
    for (double end = eng_now() + seconds; eng_now() < end; usleep(5000))
        if (waitpid(c.pid, &status, WNOHANG) == c.pid)
            return WIFEXITED(status) ? WEXITSTATUS(status) : -2;
    kill(c.pid, SIGKILL);
    waitpid(c.pid, &status, 0);
    return -1;
}

/* ---- the client ---- */

static int request(child c, const char *line, const char *body) {
    char text[1024];
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)c.port)};
    inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    int n = snprintf(text, sizeof text,
                     "%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
                     "Content-Length: %zu\r\n\r\n%s",
                     line, strlen(body), body);
    assert_int_equal(write(fd, text, (size_t)n), n);
    return fd;
}

/* Everything until the server closes. */
static char *rest_of(int fd) {
    size_t n = 0, cap = 1 << 20;
    char *text = malloc(cap);
    for (ssize_t k; n + 1 < cap && (k = read(fd, text + n, cap - n - 1)) > 0;)
        n += (size_t)k;
    text[n] = '\0';
    close(fd);
    return text;
}

static int status_of(const char *answer) { return strncmp(answer, "HTTP/1.1 ", 9) == 0 ? atoi(answer + 9) : 0; }

static int health(child c, const char *wanted) {
    double t0 = eng_now();
    char *answer = rest_of(request(c, "GET /health", ""));
    int status = status_of(answer);
    if (wanted && !strstr(answer, wanted))
        fail_msg("%s is not in %s", wanted, answer);
    assert_true(eng_now() - t0 < SLOW); /* whatever the engine does */
    free(answer);
    return status;
}

static int stream(child c, int seed) {
    char body[200];
    snprintf(body, sizeof body,
             "{\"prompt\":\"Once upon a time\",\"max_tokens\":1500,\"stream\":true,\"ignore_eos\":true,\"seed\":%d}",
             seed);
    return request(c, "POST /v1/completions", body);
}

/* ---- tests ---- */

static void device__a_sticky_error_reaches_every_stream_and_the_exit_code_is_74(void **state) {
    (void)state;
    child c = start(FAULT_DEVICE, 40);
    int fd[4]; /* two run, two wait */
    for (int i = 0; i < 4; i++)
        fd[i] = stream(c, i);
    double t0 = eng_now();
    for (int i = 0; i < 4; i++) {
        char *answer = rest_of(fd[i]);
        assert_int_equal(status_of(answer), 200);
        if (!strstr(answer, "\"error\":") || !strstr(answer, "an illegal address") || !strstr(answer, "data: [DONE]"))
            fail_msg("stream %d ended with: %s", i, answer);
        free(answer);
    }
    assert_int_equal(exit_code(c, 5 * SLOW), EXIT_DEVICE);
    assert_true(eng_now() - t0 < 5 * SLOW);
}

static void stuck__health_tells_within_two_seconds_and_recovers(void **state) {
    (void)state;
    child c = start(FAULT_PAUSE, 10);
    assert_int_equal(health(c, "\"healthy\""), 200);
    int fd = stream(c, 1);
    double t0 = eng_now(), told = 0, well = 0;
    while (well == 0 && eng_now() - t0 < 20 * SLOW) {
        int status = health(c, NULL);
        if (status == 503 && told == 0) {
            told = eng_now() - t0;
            health(c, "\"unhealthy\"");
        }
        if (status == 200 && told > 0)
            well = eng_now() - t0;
        usleep(20000);
    }
    assert_true(told > 1.9 && told < 3.5 * SLOW); /* the steps before the long one included */
    assert_true(well > 3.9);
    char *answer = rest_of(fd);
    assert_non_null(strstr(answer, "data: [DONE]"));
    assert_null(strstr(answer, "\"error\":"));
    free(answer);
    kill(c.pid, SIGTERM);
    assert_int_equal(exit_code(c, 5 * SLOW), EXIT_OK);
}

static void stuck__an_engine_that_hangs_does_not_keep_the_process(void **state) {
    (void)state;
    child c = start(FAULT_HANG, 10);
    int fd = stream(c, 1);
    while (health(c, NULL) != 503)
        usleep(20000);
    double t0 = eng_now();
    kill(c.pid, SIGTERM);
    int code = exit_code(c, 10 * SLOW);
    assert_true(code == EXIT_FAILED && eng_now() - t0 < 5 * SLOW); /* 0.5 s to drain, 2 s to notice the cancel */
    free(rest_of(fd));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(device__a_sticky_error_reaches_every_stream_and_the_exit_code_is_74),
        cmocka_unit_test(stuck__health_tells_within_two_seconds_and_recovers),
        cmocka_unit_test(stuck__an_engine_that_hangs_does_not_keep_the_process),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
