#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

struct llama_ubatch;

// Records the experts that every MoE layer chooses, and the router's probabilities of them if asked to, into an .npz
// routing trace (ids, probs, offs, meta; see llama-expert.h). Listens to the scheduler's eval callback, so that it works on every backend, with and without the expert cache, and costs nothing
// when it is off.
struct llama_expert_trace {
    // path appears when finish() succeeds, until then the ids are in a file beside it; throws std::runtime_error
    // meta_more: JSON members for the trace's meta, each followed by ", "
    llama_expert_trace(
        const std::string &              path,
        const std::string &              model,
        const std::string &              meta_more,
        int                              n_expert,
        bool                             with_probs,
        ggml_backend_sched_eval_callback cb_next,
        void *                           cb_next_user_data);
    ~llama_expert_trace(); // discards what is not finished

    llama_expert_trace(const llama_expert_trace &)             = delete;
    llama_expert_trace & operator=(const llama_expert_trace &) = delete;

    static bool eval_callback(ggml_tensor * t, bool ask, void * user_data);

    void begin_ubatch();
    void end_ubatch(const llama_ubatch & ubatch); // after a graph that succeeded

    bool finish(); // false: see error()

    const std::string & error() const { return err; }

    // the callback that was there before
    const ggml_backend_sched_eval_callback cb_next;
    void * const                           cb_next_user_data;

private:
    static constexpr uint16_t NOT_COMPUTED = 0xffff;

    std::string path;
    std::string path_tmp;
    std::string path_tmp_probs;
    std::string model;
    std::string meta_more;
    std::string err;
    FILE *      file       = nullptr;
    FILE *      file_probs = nullptr; // their values alone; null: not wanted

    int     n_expert = 0;
    int     n_layers = 0; // MoE layers, known after the first ubatch
    int     n_ids    = 0; // K
    int64_t n_tokens = 0;

    std::vector<int64_t> offs = { 0 }; // first token of every sequence

    // chosen experts of the running ubatch, by layer: rows of n_ids
    std::map<int, std::vector<uint16_t>> chosen;
    std::map<int, std::vector<float>>    probs;

    void take_ids(int il, const ggml_tensor * t);
    void take_probs(int il, const ggml_tensor * t);

    void discard();
    void fail(const std::string & text);
};
