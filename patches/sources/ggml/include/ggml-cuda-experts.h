#pragma once

#include "ggml-backend.h"
#include "ggml.h"

// Expert weights that are not in memory as a whole, for the CUDA backend (for the CPU see ggml-cpu.h): MUL_MAT_ID runs
// on an array of slots, with slot numbers in place of expert ids, or expert by expert if there are fewer slots than the
// op needs. Who owns the slots (libllama) gives a source, and takes memory for them from the backend.

#ifdef __cplusplus
extern "C" {
#endif

// the slots of one expert tensor
struct ggml_cuda_expert_slots {
    const void * base;   // of the expert in slot 0, where the owner sees it
    size_t       stride; // bytes from slot to slot, a multiple of the type's size
    int          n;
};

struct ggml_cuda_expert_source {
    void * user;

    // an op needs these experts: ids [n_ids, n_tokens] in host memory
    // No kernel reads slots when this is called for ids that are new, so any slot may get another expert.
    // false: the op needs more experts than there are slots
    bool (*begin)(void * user, const struct ggml_tensor * op, const int32_t * ids);

    // every expert of the op once, in the order in which they become available, and where it is
    // -1: that was all, -2: an expert cannot be had, -3: none is ready and wait is false
    int (*next)(void * user, bool wait, const void ** data);

    // of an op that needs more experts than there are slots: the device is done with this expert
    void (*leave)(void * user, int expert);

    struct ggml_cuda_expert_slots (*slots)(void * user, const struct ggml_tensor * tensor);

    // what a call cost: time until the ids of the router were on the host (the device was computing what comes before
    // them), and time from there to the launch without what was waited for experts (the device was idle)
    void (*timed)(void * user, const struct ggml_tensor * op, uint64_t ids_ns, uint64_t remap_ns);

    // the device failed
    void (*failed)(void * user, const char * what);
};

enum ggml_cuda_expert_memory {
    GGML_CUDA_EXPERT_MEMORY_HOST,       // pinned and mapped: read in place by an integrated GPU
    GGML_CUDA_EXPERT_MEMORY_REGISTERED, // the same from pages of this process, pinned afterwards
    GGML_CUDA_EXPERT_MEMORY_DEVICE,
};

// what the backend offers: ggml_backend_reg_get_proc_address(reg, "ggml_backend_cuda_experts") is a function that
// returns a pointer to this
struct ggml_cuda_experts_i {
    // of tensors that only MUL_MAT_ID uses, at addresses that need no memory behind them
    ggml_backend_buffer_type_t (*buffer_type)(ggml_backend_dev_t dev);
    ggml_backend_buffer_t (*buffer)(ggml_backend_dev_t dev, void * addr, size_t size, const struct ggml_cuda_expert_source * source);

    // whether the GPU shares the memory of the CPU and reads mapped host memory at full speed (asked of the device)
    bool (*integrated)(ggml_backend_dev_t dev);

    // bytes behind an expert that kernels may read and that have to be zero
    size_t (*padding)(const struct ggml_tensor * tensor);

    // zeroed, aligned to pages; NULL: cannot be had
    void * (*alloc)(ggml_backend_dev_t dev, enum ggml_cuda_expert_memory kind, size_t size);
    void (*free)(ggml_backend_dev_t dev, enum ggml_cuda_expert_memory kind, void * addr, size_t size);

    // from host memory into device memory, on a stream of its own; the bytes are there when this returns
    // NULL or what went wrong; safe to call from several threads
    const char * (*write)(ggml_backend_dev_t dev, void * dst, const void * src, size_t size);
};

#ifdef __cplusplus
}
#endif
