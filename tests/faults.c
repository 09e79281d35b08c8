// Faults in what a process writes: loaded with LD_PRELOAD, it counts the calls that change files below one folder, and
// kills the process at the n-th, cuts that write in half before it does, or lets calls fail from the n-th on.
//
// armed by fault_arm(), or by FAULT_FOLDER, FAULT_NTH and FAULT_ACTION in the environment. The counter may lie in a
// file (FAULT_COUNTER), shared by a process and its children. FAULT_LOG gets a line for every call: number, name, path.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF = -1, COUNT = 0, KILL = -2, TEAR = -3, ONCE = 1000 };
// a positive action is the errno of all failures from the n-th on, or with ONCE added that of the n-th alone

static char         folder[PATH_MAX];
static size_t       folder_length;
static long         nth;
static int          action = OFF;
static int          log_fd = -1;
static long         own_counter;
static long *       counter = &own_counter;
static __thread int inside;

void fault_arm(const char * path, long n, int what, int log) {
    action = OFF;
    if (!realpath(path, folder)) {
        abort();
    }
    folder_length = strlen(folder);
    nth           = n;
    log_fd        = log;
    action        = what;
}

__attribute__((constructor)) static void from_environment(void) {
    const char * path = getenv("FAULT_FOLDER");
    if (!path) {
        return;
    }
    const char * shared = getenv("FAULT_COUNTER");
    if (shared) {
        const int fd = open(shared, O_RDWR);
        counter      = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    const char * log = getenv("FAULT_LOG");
    fault_arm(path, atol(getenv("FAULT_NTH")), atoi(getenv("FAULT_ACTION")), log ? open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) {
        pause();
    }
}

static int is_below(const char * path) {
    return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || !path[folder_length]);
}

static int path_of(int dirfd, const char * path, char * out) {
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return 1;
    }
    char    link[64], base[PATH_MAX];
    ssize_t n;
    if (dirfd == AT_FDCWD) {
        snprintf(link, sizeof(link), "/proc/self/cwd");
    } else {
        snprintf(link, sizeof(link), "/proc/self/fd/%d", dirfd);
    }
    n = readlink(link, base, sizeof(base) - 1);
    if (n <= 0) {
        return 0;
    }
    base[n] = 0;
    if (path[0]) {
        return snprintf(out, PATH_MAX, "%s/%s", base, path) < PATH_MAX;
    }
    snprintf(out, PATH_MAX, "%s", base);
    return 1;
}

// Whether the call is the one: its action. The process may be gone when this would return.
static int meet(const char * name, int dirfd, const char * path, int is_write, int may_be_full) {
    if (action == OFF || inside) {
        return COUNT;
    }
    char full[PATH_MAX];
    int  result = COUNT;
    int  saved  = errno;
    inside      = 1;
    if (path_of(dirfd, path, full) && is_below(full)) {
        const long n = __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST);
        if (log_fd >= 0) {
            dprintf(log_fd, "%ld %s %s\n", n, name, full);
        }
        if (n == nth && (action == KILL || (action == TEAR && !is_write))) {
            die();
        }
        if (n == nth && action == TEAR) {
            result = TEAR;
        }
        // What frees space, and what only makes it durable, works on a full disk.
        const int error = action % ONCE;
        if (action > 0 && (action > ONCE ? n == nth : n >= nth) && (may_be_full || error != ENOSPC)) {
            result = error;
        }
    }
    inside = 0;
    errno  = saved;
    return result;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name)) dlsym(RTLD_NEXT, #name)
#define FAIL(what, value) do { const int error_ = (what); if (error_ > 0) { errno = error_; return value; } } while (0)

static int changes(int flags) {
    return flags & (O_CREAT | O_TRUNC);
}

#define OPENER(name)                                                                              \
    int name(const char * path, int flags, ...) {                                                 \
        REAL(name);                                                                               \
        va_list args;                                                                             \
        va_start(args, flags);                                                                    \
        const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(args, mode_t) : 0;           \
        va_end(args);                                                                             \
        if (changes(flags)) {                                                                     \
            FAIL(meet("open", AT_FDCWD, path, 0, 1), -1);                                         \
        }                                                                                         \
        return real(path, flags, mode);                                                           \
    }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name)                                                                           \
    int name(int dirfd, const char * path, int flags, ...) {                                      \
        REAL(name);                                                                               \
        va_list args;                                                                             \
        va_start(args, flags);                                                                    \
        const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(args, mode_t) : 0;           \
        va_end(args);                                                                             \
        if (changes(flags)) {                                                                     \
            FAIL(meet("open", dirfd, path, 0, 1), -1);                                            \
        }                                                                                         \
        return real(dirfd, path, flags, mode);                                                    \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

#define STREAM_OPENER(name)                                                                       \
    FILE * name(const char * path, const char * mode) {                                           \
        REAL(name);                                                                               \
        if (strpbrk(mode, "wa")) {                                                                \
            FAIL(meet("fopen", AT_FDCWD, path, 0, 1), NULL);                                      \
        }                                                                                         \
        return real(path, mode);                                                                  \
    }
STREAM_OPENER(fopen)
STREAM_OPENER(fopen64)

ssize_t write(int fd, const void * data, size_t size) {
    REAL(write);
    const int what = meet("write", fd, "", 1, 1);
    FAIL(what, -1);
    if (what == TEAR) {
        real(fd, data, size / 2);
        die();
    }
    return real(fd, data, size);
}

#define WRITER_AT(name, offset_type)                                                              \
    ssize_t name(int fd, const void * data, size_t size, offset_type offset) {                    \
        REAL(name);                                                                               \
        const int what = meet("pwrite", fd, "", 1, 1);                                            \
        FAIL(what, -1);                                                                           \
        if (what == TEAR) {                                                                       \
            real(fd, data, size / 2, offset);                                                     \
            die();                                                                                \
        }                                                                                         \
        return real(fd, data, size, offset);                                                      \
    }
WRITER_AT(pwrite, off_t)
WRITER_AT(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec * parts, int count) {
    REAL(writev);
    const int what = meet("writev", fd, "", 1, 1);
    FAIL(what, -1);
    if (what == TEAR) {
        write(fd, parts[0].iov_base, parts[0].iov_len / 2);
        die();
    }
    return real(fd, parts, count);
}

size_t fwrite(const void * data, size_t size, size_t count, FILE * file) {
    REAL(fwrite);
    const int what = action == OFF ? COUNT : meet("fwrite", fileno(file), "", 1, 1);
    FAIL(what, 0);
    if (what == TEAR) {
        real(data, 1, size * count / 2, file);
        fflush(file);
        die();
    }
    return real(data, size, count, file);
}

ssize_t copy_file_range(int in, off64_t * in_offset, int out, off64_t * out_offset, size_t size, unsigned flags) {
    REAL(copy_file_range);
    const int what = meet("copy_file_range", out, "", 1, 1);
    FAIL(what, -1);
    if (what == TEAR) {
        real(in, in_offset, out, out_offset, size / 2, flags);
        die();
    }
    return real(in, in_offset, out, out_offset, size, flags);
}

#define SENDER(name, offset_type)                                                                 \
    ssize_t name(int out, int in, offset_type * offset, size_t size) {                            \
        REAL(name);                                                                               \
        const int what = meet("sendfile", out, "", 1, 1);                                         \
        FAIL(what, -1);                                                                           \
        if (what == TEAR) {                                                                       \
            real(out, in, offset, size / 2);                                                      \
            die();                                                                                \
        }                                                                                         \
        return real(out, in, offset, size);                                                       \
    }
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off64_t *, size_t);
SENDER(sendfile, off_t)
SENDER(sendfile64, off64_t)

#define ON_DESCRIPTOR(name, parameters, arguments, label, full)                                   \
    int name parameters {                                                                         \
        REAL(name);                                                                               \
        FAIL(meet(label, fd, "", 0, full), -1);                                                   \
        return real arguments;                                                                    \
    }
ON_DESCRIPTOR(fsync, (int fd), (fd), "fsync", 1)
ON_DESCRIPTOR(fdatasync, (int fd), (fd), "fsync", 1)
ON_DESCRIPTOR(ftruncate, (int fd, off_t size), (fd, size), "ftruncate", 1)
ON_DESCRIPTOR(ftruncate64, (int fd, off64_t size), (fd, size), "ftruncate", 1)
ON_DESCRIPTOR(fallocate, (int fd, int mode, off_t offset, off_t size), (fd, mode, offset, size), "fallocate", 1)

#define ON_PATH(name, parameters, arguments, label, dirfd, path, full)                            \
    int name parameters {                                                                         \
        REAL(name);                                                                               \
        FAIL(meet(label, dirfd, path, 0, full), -1);                                              \
        return real arguments;                                                                    \
    }
ON_PATH(truncate, (const char * path, off_t size), (path, size), "truncate", AT_FDCWD, path, 1)
ON_PATH(truncate64, (const char * path, off64_t size), (path, size), "truncate", AT_FDCWD, path, 1)
ON_PATH(unlink, (const char * path), (path), "unlink", AT_FDCWD, path, 0)
ON_PATH(unlinkat, (int dirfd, const char * path, int flags), (dirfd, path, flags), "unlink", dirfd, path, 0)
ON_PATH(rmdir, (const char * path), (path), "rmdir", AT_FDCWD, path, 0)
ON_PATH(mkdir, (const char * path, mode_t mode), (path, mode), "mkdir", AT_FDCWD, path, 1)
ON_PATH(mkdirat, (int dirfd, const char * path, mode_t mode), (dirfd, path, mode), "mkdir", dirfd, path, 1)
ON_PATH(rename, (const char * from, const char * to), (from, to), "rename", AT_FDCWD, to, 1)
ON_PATH(renameat, (int from_dir, const char * from, int dirfd, const char * to), (from_dir, from, dirfd, to), "rename", dirfd, to, 1)
ON_PATH(link, (const char * from, const char * to), (from, to), "link", AT_FDCWD, to, 1)
ON_PATH(symlink, (const char * from, const char * to), (from, to), "symlink", AT_FDCWD, to, 1)
