// A tiny model loaded with the expert cache on, two tokens decoded, and freed, again and again: for valgrind.
// Built and run by scripts/leak_check.py.
//
//     leak-check MODEL CYCLES [leak]

#include "llama-expert.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static llama_model_kv_override override_str(const char * key, const std::string & value) {
    llama_model_kv_override res = {};
    res.tag                     = LLAMA_KV_OVERRIDE_TYPE_STR;
    snprintf(res.key, sizeof(res.key), "%s", key);
    snprintf(res.val_str, sizeof(res.val_str), "%s", value.c_str());
    return res;
}

static bool cycle(const char * path, const std::string & warm) {
    const llama_model_kv_override overrides[] = {
        override_str("expert_cache.budget", "3s"),
        override_str("expert_cache.verify", "on"),
        override_str("expert_cache.prefetch", "router"),
        override_str("expert_cache.warm", warm),
        {},
    };
    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers       = 0;
    mparams.kv_overrides       = overrides;

    llama_model * model = llama_model_load_from_file(path, mparams);
    if (!model) {
        return false;
    }
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                = 64;
    cparams.n_batch              = 8;
    cparams.n_ubatch             = 8;
    cparams.n_threads            = 2;
    cparams.n_threads_batch      = 2;

    llama_context * ctx = llama_init_from_model(model, cparams);
    bool            ok  = ctx != nullptr;
    for (llama_token token = 10; ok && token < 12; token++) {
        ok = llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0;
    }
    llama_expert_cache_stats stats = {};
    ok                             = ok && llama_expert_cache_get_stats(model, -1, &stats, sizeof(stats)) && stats.hits + stats.misses > 0 && stats.reads_wrong == 0;
    if (ctx) {
        llama_free(ctx);
    }
    llama_model_free(model);
    return ok;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL CYCLES [leak]\n", argv[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    },
        nullptr);
    llama_backend_init();

    const int n = atoi(argv[2]);
    for (int i = 0; i < n; i++) {
        if (argc > 3) {
            volatile char * lost = (char *) malloc(16);
            lost[0]              = 1;
        }
        if (!cycle(argv[1], std::string(argv[1]) + ".hot")) {
            fprintf(stderr, "cycle %d of %d failed\n", i, n);
            return 1;
        }
    }
    llama_backend_free();
    printf("%d cycles\n", n);
    return 0;
}
