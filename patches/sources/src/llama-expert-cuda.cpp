#include "llama-expert-cuda.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

llama_expert_cuda_memory::llama_expert_cuda_memory(const ggml_cuda_experts_i & cuda, ggml_backend_dev_t dev, const llama_expert_files & files) : cuda(cuda), dev(dev) {
    for (const auto kind : { GGML_CUDA_EXPERT_MEMORY_HOST, GGML_CUDA_EXPERT_MEMORY_REGISTERED }) {
        if (can_read_into(kind, files)) {
            pinned = kind;
            break;
        }
    }
    if (cuda.integrated(dev)) {
        slots = pinned;
    }
}

bool llama_expert_cuda_memory::can_read_into(enum ggml_cuda_expert_memory kind, const llama_expert_files & files) const {
    void * addr = cuda.alloc(dev, kind, LLAMA_EXPERT_IO_ALIGN);
    if (addr == nullptr) {
        return false;
    }
    const std::string err = files.read(0, 0, std::min(files.size(0), LLAMA_EXPERT_IO_ALIGN), (uint8_t *) addr);

    cuda.free(dev, kind, addr, LLAMA_EXPERT_IO_ALIGN);

    return err.empty();
}

const char * llama_expert_cuda_memory::description() const {
    switch (slots) {
        case GGML_CUDA_EXPERT_MEMORY_HOST: return "pinned memory that the GPU reads in place";
        case GGML_CUDA_EXPERT_MEMORY_REGISTERED: return "registered memory that the GPU reads in place";
        case GGML_CUDA_EXPERT_MEMORY_DEVICE: break;
    }
    return pinned == GGML_CUDA_EXPERT_MEMORY_DEVICE ? "device memory, copied from pageable memory" : "device memory, copied from pinned memory";
}

uint8_t * llama_expert_cuda_memory::alloc(size_t size) {
    return (uint8_t *) cuda.alloc(dev, slots, size);
}

void llama_expert_cuda_memory::free(uint8_t * addr, size_t size) {
    cuda.free(dev, slots, addr, size);
}

uint8_t * llama_expert_cuda_memory::alloc_staging(size_t size) {
    if (pinned != GGML_CUDA_EXPERT_MEMORY_DEVICE) {
        return (uint8_t *) cuda.alloc(dev, pinned, size);
    }
    return (uint8_t *) aligned_alloc(LLAMA_EXPERT_IO_ALIGN, size);
}

void llama_expert_cuda_memory::free_staging(uint8_t * addr, size_t size) {
    if (pinned != GGML_CUDA_EXPERT_MEMORY_DEVICE) {
        cuda.free(dev, pinned, addr, size);
    } else {
        ::free(addr);
    }
}

std::string llama_expert_cuda_memory::write(uint8_t * dst, const uint8_t * src, size_t size) {
    if (in_place()) {
        memcpy(dst, src, size);
        return "";
    }
    const char * err = cuda.write(dev, dst, src, size);

    return err ? std::string("cannot copy to the device: ") + err : "";
}
