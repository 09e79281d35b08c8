#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Where slots are if not in ordinary memory of this process. Safe to call from several threads.
struct llama_expert_memory {
    virtual ~llama_expert_memory() = default;

    // zeroed, aligned to LLAMA_EXPERT_IO_ALIGN; nullptr: cannot be had
    virtual uint8_t * alloc(size_t size)                        = 0;
    virtual void      free(uint8_t * addr, size_t size)         = 0;
    virtual uint8_t * alloc_staging(size_t size)                = 0;
    virtual void      free_staging(uint8_t * addr, size_t size) = 0;

    // from staging memory into a slot; "" or what went wrong
    virtual std::string write(uint8_t * dst, const uint8_t * src, size_t size) = 0;
};
