// libFuzzer target: a GGUF through the patched loader with the expert cache on, a context, and three tokens.
// Built and run by scripts/fuzz_loader.py, with AddressSanitizer. GGML_ASSERT is no finding here: it ends a run.

#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <sys/mman.h>
#include <unistd.h>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

static jmp_buf gave_up;
static int     file = -1;

// weights are most of a file and say nothing: nearly all changes go to its beginning, in place
static constexpr size_t HEADER = 4096;

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    file = memfd_create("fuzz", 0);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_set_abort_callback([](const char *) { longjmp(gave_up, 1); });
    llama_backend_init();
    return file < 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    srand(seed);
    if (size < 64 || rand() % 16 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    const size_t n  = 4 + rand() % 28;
    const size_t at = rand() % (std::min(size, HEADER) - n);
    LLVMFuzzerMutate(data + at, n, n);
    return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != (ssize_t) size) {
        abort();
    }
    if (setjmp(gave_up)) {
        return 0; // what was allocated until then is lost; a fork of libFuzzer does not live long
    }

    llama_model_kv_override overrides[2] = {};
    overrides[0].tag                     = LLAMA_KV_OVERRIDE_TYPE_STR;
    strcpy(overrides[0].key, "expert_cache.budget");
    strcpy(overrides[0].val_str, "2s");

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers       = 0;
    mparams.kv_overrides       = overrides;

    const std::string path  = "/proc/self/fd/" + std::to_string(file);
    llama_model *     model = llama_model_load_from_file(path.c_str(), mparams);
    if (!model) {
        return 0;
    }
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                = 64;
    cparams.n_batch              = 8;
    cparams.n_ubatch             = 8;
    cparams.n_threads            = 1;
    cparams.n_threads_batch      = 1;
    if (llama_context * ctx = llama_init_from_model(model, cparams)) {
        const int32_t n_vocab   = llama_vocab_n_tokens(llama_model_get_vocab(model));
        llama_token   tokens[3] = { 0, 1, 2 };
        if (n_vocab > 2) {
            llama_decode(ctx, llama_batch_get_one(tokens, 3));
        }
        llama_free(ctx);
    }
    llama_model_free(model);
    return 0;
}
