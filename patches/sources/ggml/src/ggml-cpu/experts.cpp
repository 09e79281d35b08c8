#include "experts.h"

#include "repack.h"
#include "traits.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

// Expert buffer: addresses for expert tensors whose bytes MUL_MAT_ID gets from a ggml_cpu_expert_source.
// The buffer is its own type, so that tensors in it are recognised without a registry, and a host buffer, so that the
// scheduler runs their ops on the CPU.

struct ggml_backend_cpu_expert_buffer_context {
    void *                        addr;
    struct ggml_cpu_expert_source source;
    bool                          repack;
};

static void ggml_backend_cpu_expert_buffer_free(ggml_backend_buffer_t buffer) {
    delete (ggml_backend_cpu_expert_buffer_context *) buffer->context;
}

static void * ggml_backend_cpu_expert_buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((ggml_backend_cpu_expert_buffer_context *) buffer->context)->addr;
}

static enum ggml_status ggml_backend_cpu_expert_buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
#ifdef GGML_USE_CPU_REPACK
    if (((ggml_backend_cpu_expert_buffer_context *) buffer->context)->repack && ggml_n_dims(tensor) == 3) {
        tensor->extra = ggml_backend_cpu_repack_traits(tensor);
    }
#else
    GGML_UNUSED(buffer);
    GGML_UNUSED(tensor);
#endif
    return GGML_STATUS_SUCCESS;
}

static void ggml_backend_cpu_expert_buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t, size_t, size_t) {
    GGML_ABORT("%s: the experts of %s are not in memory", __func__, tensor->name);
}

static void ggml_backend_cpu_expert_buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void *, size_t, size_t) {
    GGML_ABORT("%s: the experts of %s are not in memory", __func__, tensor->name);
}

static void ggml_backend_cpu_expert_buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void *, size_t, size_t) {
    GGML_ABORT("%s: the experts of %s are not in memory", __func__, tensor->name);
}

static void ggml_backend_cpu_expert_buffer_clear(ggml_backend_buffer_t, uint8_t) {
    GGML_ABORT("%s: experts are not in memory", __func__);
}

static const struct ggml_backend_buffer_i ggml_backend_cpu_expert_buffer_i = {
    /* .free_buffer   = */ ggml_backend_cpu_expert_buffer_free,
    /* .get_base      = */ ggml_backend_cpu_expert_buffer_get_base,
    /* .init_tensor   = */ ggml_backend_cpu_expert_buffer_init_tensor,
    /* .memset_tensor = */ ggml_backend_cpu_expert_buffer_memset_tensor,
    /* .set_tensor    = */ ggml_backend_cpu_expert_buffer_set_tensor,
    /* .get_tensor    = */ ggml_backend_cpu_expert_buffer_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ ggml_backend_cpu_expert_buffer_clear,
    /* .reset         = */ nullptr,
};

static const char * ggml_backend_cpu_expert_buffer_type_get_name(ggml_backend_buffer_type_t) {
    return "CPU_Experts";
}

// who allocates in the type of an expert tensor (a LoRA adapter does, for its own matrices) gets ordinary memory
static ggml_backend_buffer_t ggml_backend_cpu_expert_buffer_type_alloc_buffer(ggml_backend_buffer_type_t, size_t size) {
    return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
}

static size_t ggml_backend_cpu_expert_buffer_type_get_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

static bool ggml_backend_cpu_expert_buffer_type_is_host(ggml_backend_buffer_type_t) {
    return true;
}

ggml_backend_buffer_type_t ggml_backend_cpu_expert_buffer_type(void) {
    // clang-format off
    static struct ggml_backend_buffer_type buft = {
        /* .iface   = */ {
            /* .get_name       = */ ggml_backend_cpu_expert_buffer_type_get_name,
            /* .alloc_buffer   = */ ggml_backend_cpu_expert_buffer_type_alloc_buffer,
            /* .get_alignment  = */ ggml_backend_cpu_expert_buffer_type_get_alignment,
            /* .get_max_size   = */ nullptr, // defaults to SIZE_MAX
            /* .get_alloc_size = */ nullptr, // defaults to ggml_nbytes
            /* .is_host        = */ ggml_backend_cpu_expert_buffer_type_is_host,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ nullptr,
    };
    // clang-format on
    return &buft;
}

ggml_backend_buffer_t ggml_backend_cpu_expert_buffer(void * addr, size_t size, const struct ggml_cpu_expert_source * source, bool repack) {
    auto * context = new ggml_backend_cpu_expert_buffer_context{ addr, *source, repack };

    return ggml_backend_buffer_init(ggml_backend_cpu_expert_buffer_type(), ggml_backend_cpu_expert_buffer_i, context, size);
}

const struct ggml_cpu_expert_source * ggml_cpu_expert_source_of(const struct ggml_tensor * tensor) {
    // the free function tells expert buffers from ordinary ones that were allocated in their type
    if (tensor->buffer == nullptr || tensor->buffer->iface.free_buffer != ggml_backend_cpu_expert_buffer_free) {
        return nullptr;
    }
    return &((ggml_backend_cpu_expert_buffer_context *) tensor->buffer->context)->source;
}

bool ggml_backend_cpu_expert_repack(const struct ggml_tensor * tensor, const void * src, void * dst) {
    if (tensor->extra == nullptr || ggml_cpu_expert_source_of(tensor) == nullptr) {
        return false;
    }
    if (dst != nullptr) {
        // one expert as a tensor of its own; it has no name, see repack.cpp
        struct ggml_tensor expert = *tensor;
        expert.ne[2]              = 1;
        expert.data               = dst;
        expert.name[0]            = '\0';
        ggml_backend_cpu_repack(&expert, src, tensor->nb[2]);
    }
    return true;
}
