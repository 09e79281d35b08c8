#pragma once

#include "llama-expert-bias.h"
#include "llama-expert-cache.h"
#include "llama-expert-cuda.h"
#include "llama-expert-forecast.h"
#include "llama-expert-warm.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>

struct llama_hparams;
struct llama_model;
struct llama_model_kv_override;
struct llama_model_loader;

// The experts of one model that live in a cache: connects the loader, the MUL_MAT_ID of ggml-cpu or ggml-cuda and the cache.

struct llama_expert_config {
    static constexpr int N_THREADS = 4; // storage is busy from a queue depth of 4, see docs/performance.md

    std::string          budget    = "off"; // as the user wrote it
    llama_expert_policy  policy    = LLAMA_EXPERT_POLICY_NEXT_USE;
    llama_expert_io_mode io        = LLAMA_EXPERT_IO_AUTO;
    int                  n_threads = N_THREADS; // 0: as many as the storage wants
    bool                 verify    = false; // compare every read with a checksum taken at load

    enum { PREFETCH_OFF,
        PREFETCH_ROUTER,
        PREFETCH_AUTO } prefetch = PREFETCH_OFF; // router: read ahead what the next layer's router would choose; auto: where that is right

    std::string warm; // file of the hot set: read at load, written when the model is freed; "": none

    double route_bias = 0.0; // lossy: prefer experts in the cache, see llama-expert-bias.h; 0: off
    int    route_keep = 1;   // the router's first choices stay

    enum { REPACK_AUTO,
        REPACK_ON,
        REPACK_OFF } repack = REPACK_AUTO; // auto: if all experts fit, see docs/performance.md

    // the expert_cache.* keys of a model's overrides; throws std::runtime_error
    static llama_expert_config from_overrides(const std::unordered_map<std::string, llama_model_kv_override> & overrides);

    bool enabled() const { return budget != "off"; }
};

struct llama_experts {
    explicit llama_experts(const llama_expert_config & config);
    ~llama_experts();

    llama_experts(const llama_experts &)             = delete;
    llama_experts & operator=(const llama_experts &) = delete;

    // whether a tensor of the model file goes through the cache, by name
    static bool takes(const std::string & name);

    // decide where experts are computed: on the GPU if it has all layers; throws std::runtime_error
    void choose_device(const llama_model & model);

    // buffer type of the tensors in the cache
    ggml_backend_buffer_type_t buft() const;

    // give the tensors of ctx addresses that are never touched, and set up the cache on the files of the loader;
    // throws std::runtime_error
    // may_repack: the repacked kernels of this CPU are allowed (no --no-repack)
    ggml_backend_buffer_t load(ggml_context * ctx, const llama_model_loader & ml, const llama_hparams & hparams, bool may_repack);

    // a context was created: n_compute bytes of buffers are reserved but not yet touched
    void on_context(const llama_model & model, size_t n_compute);

    // scores: [n_expert, n_tokens] of the router of block il. Returns scores that are ordered as they are with the
    // route bias, by the experts that are in the cache when the graph comes to this point.
    ggml_tensor * bias(ggml_context * ctx, ggml_tensor * scores, int il);

    // hold the result while a graph runs
    std::unique_lock<std::mutex> begin_graph() { return std::unique_lock<std::mutex>(cache->turn()); }

    llama_expert_config config;
    size_t              budget = 0; // bytes
    std::string         warm_state; // "loaded" or why the start was cold; "" without config.warm

    std::unique_ptr<llama_expert_files>       files; // outlive the cache
    std::unique_ptr<llama_expert_cuda_memory> memory; // of slots for a GPU
    std::unique_ptr<llama_expert_cache>       cache;

    // "off", "router" or "auto"
    const char * prefetch_name() const;

    // which kernels compute the experts
    const char * kernels() const { return cuda ? "cuda" : cache->transforms() ? "repack"
                                                                              : "plain"; }

private:
    struct place {
        int group;
        int tensor;
    };

    // the op's user data
    struct chooser {
        llama_experts *   experts;
        int               group;
        llama_expert_bias bias;
    };

    std::unordered_map<const ggml_tensor *, place> places;
    std::vector<std::vector<const ggml_tensor *>>  tensors; // [group][tensor]
    std::vector<int>                               blocks;  // [group] il, -1: not the experts that the router chooses
    std::vector<llama_expert_router>               routers; // [group], empty: no prefetch
    std::vector<chooser>                           choosers; // [group], empty: no route bias

    llama_expert_hot_set hot; // as read

    int n_expert_max = 0;

    double       test_wrong = 0.0; // for tests: share of the forecast that is made wrong
    std::mt19937 test_rng;

    const ggml_cuda_experts_i * cuda = nullptr; // set if experts are computed on the GPU
    ggml_backend_dev_t          gpu  = nullptr;

    void * range   = nullptr; // reserved addresses
    size_t n_range = 0;

    bool fits(size_t n_bytes) const;
    int  find_n_threads(const std::vector<llama_expert_group_desc> & groups) const;
    void verify();
    void check_gpu(ggml_tensor * weight) const;
    void allocate(int n_slots);
    void read_hot_set(const llama_model_loader & ml);
    void load_experts();
    void write_hot_set();
    void find_routers(const llama_model & model);
    void find_choosers(const llama_hparams & hparams);
    void prefetch(int group, const ggml_tensor * input);
    void degrade(int group, std::vector<int> & experts);

    static void choose(ggml_tensor * dst, const ggml_tensor * scores, int ith, int nth, void * user);
    static void source_begin(void * user, const ggml_tensor * op, int n_threads);
    static int  source_next(void * user, int ith, const void ** data);

    static ggml_cuda_expert_source cuda_source(llama_experts * self);
};
