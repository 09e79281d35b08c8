#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Bounded, exact expert cache: the expert weights of a MoE model stay on storage and pass through a fixed number
// of slots in memory.
//
// The cache belongs to a model and is configured when the model is loaded, by these keys in
// llama_model_params.kv_overrides:
//
//   expert_cache.budget   str  "880MiB" (bytes for slots and metadata), "16s" (slots per layer), "auto", "off"
//   expert_cache.policy   str  "next-use", "lfu" (decayed frequency) or "lru"
//   expert_cache.io       str  "auto", "direct" (O_DIRECT), "mmap" (through the page cache)
//   expert_cache.threads  int  reader threads; str "auto": as many as the storage wants, found by reading at the first load and
//                              remembered in ~/.cache/remoe-edge
//   expert_cache.prefetch str  "off", "router" (read ahead what the next layer's router would choose), "auto" (in layers, and
//                              as long as, most of that is needed; off on a GPU)
//   expert_cache.repack   str  "auto", "on", "off"
//   expert_cache.verify   str  "off", "on": compare every read with a checksum of the expert. They are taken when the slots
//                              are allocated, by reading all experts once, and are 8 bytes for each slice
//   expert_cache.warm     str  a file: what has slots when the model is freed is written to it, and read at the next load
//
// With a budget that holds all experts they are read at load, in the order of the file, without calls having to wait for
// it; with expert_cache.warm those that the file names are.
//
// and, at the price of the exactness:
//
//   expert_cache.route_bias  float  above 0, at most 4: when a token comes alone, routers prefer experts in the cache
//                                   (cache-prior, arXiv 2412.00099; llama-expert-bias.h)
//   expert_cache.route_keep  int    the router's own first choices always stay (default: 1)

#ifdef __cplusplus
extern "C" {
#endif

// what was decided at load; a text field is valid as long as the model
struct llama_expert_cache_info {
    uint64_t     budget;        // bytes asked for (or derived from "auto")
    uint64_t     used;          // bytes taken by slots and metadata, <= budget
    uint64_t     floor;         // least budget that can work, in bytes
    uint64_t     expert_bytes;  // bytes of all expert weights in the file
    uint32_t     n_layers;      // MoE layers (expert groups)
    uint32_t     n_slots;       // slots per layer
    uint32_t     n_threads;     // reader threads
    const char * policy;        // "next-use", "lfu", "lru"
    const char * io;            // "direct", "mmap"
    const char * kernels;       // "plain": expert weights as they are in the file; "repack": in the layout of this CPU's kernels; "cuda"
    const char * prefetch;      // "off", "router", "auto"
    double       route_bias;    // 0: routing is the model's own, the output exact
    int32_t      route_keep;
    int32_t      verify;        // 1: reads are compared with checksums
    const char * warm;          // "": no expert_cache.warm; "loaded", or why the start was cold
    uint64_t     bytes_loaded;  // read so far because of the load, not of a call: no counter has them
};

// counters since load or the last reset
struct llama_expert_cache_stats {
    uint64_t calls;             // MoE layer evaluations
    uint64_t calls_streamed;    // of these, evaluations that needed more experts than there are slots
    uint64_t hits;              // distinct experts of a call found in a slot, or on their way into one
    uint64_t misses;            // distinct experts of a call read from storage
    uint64_t evictions;         // experts that lost their slot
    uint64_t bytes_demand;      // bytes of expert weights read because a call needed them
    uint64_t bytes_prefetch;    // bytes of expert weights read ahead of their call
    uint64_t reads;             // read requests
    uint64_t stall_ns;          // time compute waited with no expert ready
    uint64_t read_ns;           // sum over readers of the time spent in reads
    uint64_t hits_prefetch;       // of the hits, experts that were there, or on their way, because they were read ahead
    uint64_t bytes_prefetch_used; // of bytes_prefetch, bytes of experts that the next call of their layer needed
    uint64_t reads_wrong;         // with expert_cache.verify: reads that gave wrong bytes; they were made once more
    uint64_t ids_ns;              // on a GPU: time until the ids of the router were on the host, the GPU computes meanwhile
    uint64_t remap_ns;            // on a GPU: time from there to the launch without stall_ns, the GPU is idle meanwhile
    uint64_t forecasts;           // with expert_cache.prefetch: evaluations before which their experts were forecast
    uint64_t forecasts_read;      // of these, evaluations for which experts were read ahead
    uint64_t forecast_experts;    // experts that were forecast and were in no slot
    uint64_t forecast_used;       // of these, experts that the evaluation needed: used / experts is the precision,
    uint64_t forecast_needed;     // experts that these evaluations needed and that were in no slot: used / needed the recall
    uint64_t forecast_ns;         // time that compute took for forecasts
};

// false if the model has no expert cache; size is sizeof(*info), so that the struct can grow
LLAMA_API bool llama_expert_cache_get_info(const struct llama_model * model, struct llama_expert_cache_info * info, size_t size);

// counters of MoE layer il in [0, n_layers), or of all layers for il < 0; false if there is no such layer
LLAMA_API bool llama_expert_cache_get_stats(const struct llama_model * model, int32_t il, struct llama_expert_cache_stats * stats, size_t size);

// return when what is read at load has been read
LLAMA_API void llama_expert_cache_wait(const struct llama_model * model);

LLAMA_API void llama_expert_cache_reset_stats(struct llama_model * model);

// the last failed read, with file, tensor, expert and offset; "" if there was none
LLAMA_API const char * llama_expert_cache_last_error(const struct llama_model * model);

// for tests: invert one byte of one slot of MoE layer il that holds an expert; false if there is none
LLAMA_API bool llama_expert_cache_flip_byte(struct llama_model * model, int32_t il);

// record the expert ids that every MoE layer chooses in this context into an .npz routing trace:
// ids [tokens, layers, k] uint16 (65535: not computed, as for prompt tokens in the last layer), offs [sequences + 1],
// meta, and with probs: probs [tokens, layers, k] float32, what the router gave each of them before the weights are
// normalised and scaled: its softmax or sigmoid over all experts, in gpt-oss the softmax over the chosen ones.
// The file appears whole when the recording is stopped or the context is freed.
LLAMA_API bool llama_expert_trace_start(struct llama_context * ctx, const char * path, bool probs);
LLAMA_API bool llama_expert_trace_stop(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
