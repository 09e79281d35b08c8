#include "llama-expert-text.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#ifdef __linux__
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

std::string llama_expert_text_read(const std::string & path, size_t n_max, std::string & res, bool & missing) {
    // not to be held up by a pipe
    const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    missing      = fd < 0 && errno == ENOENT;
    if (fd < 0) {
        return strerror(errno);
    }
    std::string err;
    struct stat st;
    if (fstat(fd, &st) != 0) {
        err = strerror(errno);
    } else if (!S_ISREG(st.st_mode)) {
        err = "it is not a regular file";
    } else {
        res.resize(std::min<size_t>(st.st_size, n_max));
        size_t done = 0;
        while (done < res.size()) {
            const ssize_t n = read(fd, &res[done], res.size() - done);
            if (n < 0 && errno == EINTR) {
                continue;
            }
            if (n <= 0) {
                err = n < 0 ? strerror(errno) : "it changed while it was read";
                break;
            }
            done += n;
        }
    }
    close(fd);
    return err;
}

std::string llama_expert_text_write(const std::string & path, const std::string & text) {
    const std::string path_tmp = path + ".tmp-" + std::to_string(getpid());

    FILE * file = fopen(path_tmp.c_str(), "wb");
    if (!file) {
        return strerror(errno);
    }
    bool ok         = fwrite(text.data(), 1, text.size(), file) == text.size() && fflush(file) == 0 && fsync(fileno(file)) == 0;
    int  err        = errno;
    ok              = fclose(file) == 0 && ok;
    const bool done = ok && rename(path_tmp.c_str(), path.c_str()) == 0;
    if (done) {
        return "";
    }
    err = ok ? errno : err;
    remove(path_tmp.c_str());
    return strerror(err);
}

#else

std::string llama_expert_text_read(const std::string &, size_t, std::string &, bool &) { return "not supported"; }
std::string llama_expert_text_write(const std::string &, const std::string &) { return "not supported"; }

#endif
