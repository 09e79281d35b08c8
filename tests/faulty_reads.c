// Preloaded into a process: reads of one file by pread(2) fail as a control file says (tests/test_runtime_faults.py).
//
// The control file, named by FAULTY_READS, is mapped, so that whoever writes to it is heard at once.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

struct control {
    uint64_t device, inode; // of the file
    int32_t  kind;          // enum kind
    int32_t  at;            // the read that fails, counted from 0; negative: none
    int32_t  persistent;    // and all after it
    int32_t  n_reads, n_fired;
};

enum kind { EIO_,
    ENOMEM_,
    EINTR_,
    ZERO,
    SHORT,
    SLOW,
    WRONG };

typedef ssize_t (*pread_function)(int, void *, size_t, off_t);

static pread_function   real_pread;
static struct control * control;

__attribute__((constructor)) static void start(void) {
    real_pread = (pread_function) dlsym(RTLD_NEXT, "pread");

    const char * path = getenv("FAULTY_READS");
    const int    fd   = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void * address = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        control        = address == MAP_FAILED ? NULL : address;
        close(fd);
    }
}

ssize_t pread(int fd, void * data, size_t size, off_t offset) {
    struct stat st;
    if (!control || control->at < 0 || fstat(fd, &st) != 0 || st.st_ino != control->inode || st.st_dev != control->device) {
        return real_pread(fd, data, size, offset);
    }
    const int32_t n = __atomic_fetch_add(&control->n_reads, 1, __ATOMIC_SEQ_CST);
    if (n < control->at || (n > control->at && !control->persistent)) {
        return real_pread(fd, data, size, offset);
    }
    __atomic_fetch_add(&control->n_fired, 1, __ATOMIC_SEQ_CST);
    switch (control->kind) {
        case EIO_: errno = EIO; return -1;
        case ENOMEM_: errno = ENOMEM; return -1;
        case EINTR_: errno = EINTR; return -1;
        case ZERO: return 0;
        case SLOW: usleep(control->persistent ? 100 : 2000); break;
    }
    const ssize_t got = real_pread(fd, data, size, offset);
    if (control->kind == SHORT && got > 1) {
        return got / 2;
    }
    if (control->kind == WRONG && got > 0) {
        ((uint8_t *) data)[got / 2] ^= 0x10;
    }
    return got;
}

ssize_t pread64(int fd, void * data, size_t size, off_t offset) {
    return pread(fd, data, size, offset);
}
