#pragma once

#include "llama-expert-io.h"
#include "llama-expert-memory.h"

#include "ggml-cuda-experts.h"

// Memory of slots for a CUDA device.
//
// An integrated GPU shares the memory of the CPU: slots are pinned host memory, which direct reads fill and kernels read
// where it is. Whether the kernel lets O_DIRECT write there is tried out with one block of the file: memory that CUDA
// allocated, then pages of this process that CUDA registered. Where neither works, and on a discrete GPU, slots are device
// memory, and readers copy to it from staging memory, the same two kinds or, if there is nothing better, ordinary pages.
struct llama_expert_cuda_memory final : llama_expert_memory {
    llama_expert_cuda_memory(const ggml_cuda_experts_i & cuda, ggml_backend_dev_t dev, const llama_expert_files & files);

    // whether readers write into slots
    bool in_place() const { return slots != GGML_CUDA_EXPERT_MEMORY_DEVICE; }

    const char * description() const;

    uint8_t *   alloc(size_t size) override;
    void        free(uint8_t * addr, size_t size) override;
    uint8_t *   alloc_staging(size_t size) override;
    void        free_staging(uint8_t * addr, size_t size) override;
    std::string write(uint8_t * dst, const uint8_t * src, size_t size) override;

private:
    const ggml_cuda_experts_i & cuda;
    const ggml_backend_dev_t    dev;

    enum ggml_cuda_expert_memory slots  = GGML_CUDA_EXPERT_MEMORY_DEVICE;
    enum ggml_cuda_expert_memory pinned = GGML_CUDA_EXPERT_MEMORY_DEVICE; // that files can be read into; DEVICE: none

    bool can_read_into(enum ggml_cuda_expert_memory kind, const llama_expert_files & files) const;
};
