#include "experts.cuh"
#include "experts-calls.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <array>
#include <memory>
#include <mutex>

// Experts of a source on CUDA: buffer, memory of slots, and the graph that is cut at the ops that need them. What the
// host does at such an op is in experts-calls.h. Not for HIP and MUSA.

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_backend_buft_is_cuda_experts(ggml_backend_buffer_type_t) { return false; }

int ggml_cuda_experts_find(const ggml_cgraph * cgraph, int) { return cgraph->n_nodes; }

ggml_status ggml_cuda_experts_graph_compute(ggml_backend_t, ggml_cgraph *, const ggml_cuda_expert_hooks &) { return GGML_STATUS_FAILED; }

const ggml_cuda_experts_i * ggml_backend_cuda_experts(void) { return nullptr; }

#else

#ifdef __linux__
#include <sys/mman.h>
#endif

static constexpr size_t PAGE = 4096;

static int index_of(ggml_backend_dev_t dev) {
    for (int i = 0; i < ggml_backend_cuda_get_device_count(); i++) {
        if (ggml_backend_cuda_buffer_type(i)->device == dev) {
            return i;
        }
    }
    GGML_ABORT("%s is not a CUDA device", ggml_backend_dev_name(dev));
}

// ggml-cuda.cu calls every device discrete (llama.cpp #15034), so the device itself is asked
static bool is_integrated(ggml_backend_dev_t dev) {
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, ggml_cuda_info().devices[index_of(dev)].physical_device));

    return prop.integrated != 0 && prop.canMapHostMemory != 0;
}

//
// the device of the calls
//

namespace {

struct cuda_device final : ggml_cuda_expert_device {
    const int  device;
    const bool integrated;

    int32_t * ids_host   = nullptr; // [n] each
    int32_t * slots_host = nullptr;
    int32_t * slots_dev  = nullptr; // integrated: slots_host as kernels see it

    std::array<cudaEvent_t, ggml_cuda_expert_calls::N_EVENTS> events;

    std::string text;

    cuda_device(int device, bool integrated) : device(device), integrated(integrated) {
        ggml_cuda_set_device(device);
        for (auto & event : events) {
            CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        }
    }

    ~cuda_device() override {
        ggml_cuda_set_device(device);
        release();
        for (auto & event : events) {
            (void) cudaEventDestroy(event);
        }
    }

    void release() {
        (void) cudaFreeHost(ids_host);
        (void) cudaFreeHost(slots_host);
        if (!integrated) {
            (void) cudaFree(slots_dev);
        }
        ids_host = slots_host = slots_dev = nullptr;
    }

    bool ok(cudaError_t err, const char * what) {
        if (err != cudaSuccess) {
            (void) cudaGetLastError();
            text = std::string("CUDA failed ") + what + ": " + cudaGetErrorString(err);
        }
        return err == cudaSuccess;
    }

    bool reserve(size_t n, int32_t ** ids, int32_t ** slots) override {
        static const char * what = "to allocate memory for the ids of experts";

        release();
        const size_t size = GGML_PAD(n * sizeof(int32_t), PAGE);
        if (!ok(cudaHostAlloc(&ids_host, size, cudaHostAllocPortable), what) ||
            !ok(cudaHostAlloc(&slots_host, size, cudaHostAllocMapped | cudaHostAllocPortable), what) ||
            !ok(integrated ? cudaHostGetDevicePointer(&slots_dev, slots_host, 0) : cudaMalloc(&slots_dev, size), what)) {
            return false;
        }
        *ids   = ids_host;
        *slots = slots_host;
        return true;
    }

    bool download(void * stream, const ggml_cuda_expert_ids & ids, int32_t * dst) override {
        const size_t size = ids.n_ids * sizeof(int32_t);
        return ok(cudaMemcpy2DAsync(dst, size, ids.data, ids.stride_token, size, ids.n_tokens, cudaMemcpyDeviceToHost, (cudaStream_t) stream),
            "to copy the ids of experts to the host");
    }

    bool upload(void * stream, const int32_t * slots, size_t n, const int32_t ** dst) override {
        *dst = slots_dev;
        if (integrated) {
            return true; // kernels that are launched from now on see what the host has written
        }
        return ok(cudaMemcpyAsync(slots_dev, slots, n * sizeof(int32_t), cudaMemcpyHostToDevice, (cudaStream_t) stream),
            "to copy the slots of experts to the device");
    }

    bool record(void * stream, int event) override {
        return ok(cudaEventRecord(events[event], (cudaStream_t) stream), "to record an event");
    }

    bool wait(int event) override {
        return ok(cudaEventSynchronize(events[event]), "while kernels were running");
    }

    bool reached(int event, bool * reached) override {
        const cudaError_t err = cudaEventQuery(events[event]);

        *reached = err == cudaSuccess;
        if (err == cudaErrorNotReady) {
            (void) cudaGetLastError();
            return true;
        }
        return ok(err, "while kernels were running");
    }

    const void * address(const void * slot) override {
        cudaPointerAttributes attributes;
        return ok(cudaPointerGetAttributes(&attributes, slot), "to find the memory of an expert") ? attributes.devicePointer : nullptr;
    }

    std::string error() const override { return text; }
};

struct expert_context {
    void *                 addr;
    cuda_device            device;
    ggml_cuda_expert_calls calls;

    expert_context(void * addr, const ggml_cuda_expert_source & source, ggml_backend_dev_t dev) : addr(addr), device(index_of(dev), is_integrated(dev)), calls(source, device) {}
};

} // namespace

//
// expert buffer: addresses without memory behind them, its own type, so that MUL_MAT_ID recognises tensors in it
//

static void expert_buffer_free(ggml_backend_buffer_t buffer) {
    delete (expert_context *) buffer->context;
}

static void * expert_buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((expert_context *) buffer->context)->addr;
}

static void expert_buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t, size_t, size_t) {
    GGML_ABORT("%s: the experts of %s are not in memory", __func__, tensor->name);
}

static void expert_buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void *, size_t, size_t) {
    GGML_ABORT("%s: the experts of %s are not in memory", __func__, tensor->name);
}

static void expert_buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void *, size_t, size_t) {
    GGML_ABORT("%s: the experts of %s are not in memory", __func__, tensor->name);
}

static void expert_buffer_clear(ggml_backend_buffer_t, uint8_t) {
    GGML_ABORT("%s: experts are not in memory", __func__);
}

static const ggml_backend_buffer_i expert_buffer_interface = {
    /* .free_buffer   = */ expert_buffer_free,
    /* .get_base      = */ expert_buffer_get_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ expert_buffer_memset_tensor,
    /* .set_tensor    = */ expert_buffer_set_tensor,
    /* .get_tensor    = */ expert_buffer_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ expert_buffer_clear,
    /* .reset         = */ nullptr,
};

static const char * expert_buffer_type_get_name(ggml_backend_buffer_type_t) {
    return GGML_CUDA_NAME "_Experts";
}

// who allocates in the type of an expert tensor (a LoRA adapter does, for its own matrices) gets ordinary memory
static ggml_backend_buffer_t expert_buffer_type_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    return ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(buft->device), size);
}

static size_t expert_buffer_type_get_alignment(ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(buft->device));
}

static ggml_backend_buffer_type_t expert_buffer_type(ggml_backend_dev_t dev) {
    static std::mutex                                                  mutex;
    static std::array<ggml_backend_buffer_type, GGML_CUDA_MAX_DEVICES> bufts;

    std::lock_guard<std::mutex> lock(mutex);

    auto & buft         = bufts[index_of(dev)];
    buft.iface          = {};
    buft.iface.get_name = expert_buffer_type_get_name;
    // defaults: maximum size SIZE_MAX, ggml_nbytes for a tensor, not a host buffer
    buft.iface.alloc_buffer  = expert_buffer_type_alloc_buffer;
    buft.iface.get_alignment = expert_buffer_type_get_alignment;
    buft.device              = dev;
    return &buft;
}

static ggml_backend_buffer_t expert_buffer(ggml_backend_dev_t dev, void * addr, size_t size, const ggml_cuda_expert_source * source) {
    return ggml_backend_buffer_init(expert_buffer_type(dev), expert_buffer_interface, new expert_context(addr, *source, dev), size);
}

bool ggml_backend_buft_is_cuda_experts(ggml_backend_buffer_type_t buft) {
    return buft->iface.get_name == expert_buffer_type_get_name;
}

//
// memory of slots
//

static size_t expert_padding(const ggml_tensor * tensor) {
    // as ggml_backend_cuda_buffer_type_get_alloc_size has it for the last expert of a tensor
    const int64_t ne0 = tensor->ne[0];
    if (!ggml_is_quantized(tensor->type) || ne0 % MATRIX_ROW_PADDING == 0) {
        return 0;
    }
    return ggml_row_size(tensor->type, MATRIX_ROW_PADDING - ne0 % MATRIX_ROW_PADDING);
}

static void expert_memory_free(ggml_backend_dev_t dev, ggml_cuda_expert_memory kind, void * addr, size_t size) {
    ggml_cuda_set_device(index_of(dev));
    switch (kind) {
        case GGML_CUDA_EXPERT_MEMORY_HOST:
            (void) cudaFreeHost(addr);
            break;
        case GGML_CUDA_EXPERT_MEMORY_REGISTERED:
            (void) cudaHostUnregister(addr);
#ifdef __linux__
            (void) munmap(addr, size);
#endif
            break;
        case GGML_CUDA_EXPERT_MEMORY_DEVICE:
            (void) cudaFree(addr);
            break;
    }
    GGML_UNUSED(size);
}

static void * expert_memory_alloc(ggml_backend_dev_t dev, ggml_cuda_expert_memory kind, size_t size) {
    ggml_cuda_set_device(index_of(dev));

    void *      addr = nullptr;
    cudaError_t err  = cudaErrorNotSupported;
    switch (kind) {
        case GGML_CUDA_EXPERT_MEMORY_HOST:
            err = cudaHostAlloc(&addr, size, cudaHostAllocMapped | cudaHostAllocPortable);
            if (err == cudaSuccess) {
                memset(addr, 0, size);
            }
            break;
        case GGML_CUDA_EXPERT_MEMORY_REGISTERED:
#ifdef __linux__
            addr = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (addr == MAP_FAILED) {
                return nullptr;
            }
            (void) madvise(addr, size, MADV_HUGEPAGE);
            err = cudaHostRegister(addr, size, cudaHostRegisterMapped | cudaHostRegisterPortable);
            if (err != cudaSuccess) {
                (void) munmap(addr, size);
            }
#endif
            break;
        case GGML_CUDA_EXPERT_MEMORY_DEVICE:
            err = cudaMalloc(&addr, size);
            if (err == cudaSuccess) {
                err = cudaMemsetAsync(addr, 0, size, cudaStreamPerThread);
                err = err == cudaSuccess ? cudaStreamSynchronize(cudaStreamPerThread) : err;
                if (err != cudaSuccess) {
                    (void) cudaFree(addr);
                }
            }
            break;
    }
    if (err != cudaSuccess) {
        (void) cudaGetLastError();
        return nullptr;
    }
    if ((uintptr_t) addr % PAGE != 0) {
        expert_memory_free(dev, kind, addr, size);
        return nullptr;
    }
    return addr;
}

// One stream per thread: a reader waits for its own copy only, and copies do not wait for kernels.
static const char * expert_memory_write(ggml_backend_dev_t dev, void * dst, const void * src, size_t size) {
    struct copy_stream {
        int          device = -1;
        cudaStream_t stream = nullptr;

        ~copy_stream() { reset(-1); }

        void reset(int next) {
            if (device >= 0) {
                ggml_cuda_set_device(device);
                (void) cudaStreamDestroy(stream);
            }
            device = next;
        }
    };
    static thread_local copy_stream copy;

    const int device = index_of(dev);
    ggml_cuda_set_device(device);

    cudaError_t err = cudaSuccess;
    if (copy.device != device) {
        copy.reset(-1);
        ggml_cuda_set_device(device);
        err = cudaStreamCreateWithFlags(&copy.stream, cudaStreamNonBlocking);
        if (err == cudaSuccess) {
            copy.device = device;
        }
    }
    if (err == cudaSuccess) {
        err = cudaMemcpyAsync(dst, src, size, cudaMemcpyHostToDevice, copy.stream);
    }
    if (err == cudaSuccess) {
        err = cudaStreamSynchronize(copy.stream);
    }
    if (err != cudaSuccess) {
        (void) cudaGetLastError();
        return cudaGetErrorString(err);
    }
    return nullptr;
}

const ggml_cuda_experts_i * ggml_backend_cuda_experts(void) {
    static const ggml_cuda_experts_i iface = {
        /* .buffer_type = */ expert_buffer_type,
        /* .buffer      = */ expert_buffer,
        /* .integrated  = */ is_integrated,
        /* .padding     = */ expert_padding,
        /* .alloc       = */ expert_memory_alloc,
        /* .free        = */ expert_memory_free,
        /* .write       = */ expert_memory_write,
    };
    return &iface;
}

//
// compute
//

// nullptr: an ordinary tensor
static expert_context * context_of(const ggml_tensor * tensor) {
    // the free function tells expert buffers from ordinary ones that were allocated in their type
    if (tensor->buffer == nullptr || tensor->buffer->iface.free_buffer != expert_buffer_free) {
        return nullptr;
    }
    return (expert_context *) tensor->buffer->context;
}

int ggml_cuda_experts_find(const ggml_cgraph * cgraph, int i) {
    while (i < cgraph->n_nodes && (cgraph->nodes[i]->op != GGML_OP_MUL_MAT_ID || !context_of(cgraph->nodes[i]->src[0]))) {
        i++;
    }
    return i;
}

static bool mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_cuda_expert_hooks & hooks) {
    const ggml_tensor * ids   = dst->src[2];
    auto &              calls = context_of(dst->src[0])->calls;

    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t) && ids->ne[2] == 1 && ids->ne[3] == 1);

    // these kernels take the experts one by one anyway, and want ids that are on the device
    const bool one_by_one = hooks.needs_sync(dst, ggml_cuda_info().devices[ctx.device].cc);

    switch (calls.begin(ctx.stream(), dst, ids, { ids->data, ids->ne[0], ids->ne[1], ids->nb[1] }, one_by_one)) {
        case ggml_cuda_expert_calls::FAILED:
            return false;
        case ggml_cuda_expert_calls::SLOTS: {
            const auto & slots = calls.slots();

            ggml_tensor src0 = *dst->src[0];
            src0.data        = const_cast<void *>(slots.base);
            src0.ne[2]       = slots.n;
            src0.nb[2]       = slots.stride;
            src0.nb[3]       = slots.stride * slots.n;

            ggml_tensor slot_ids = *ids;
            slot_ids.data        = const_cast<int32_t *>(calls.ids());
            slot_ids.nb[1]       = ids->ne[0] * sizeof(int32_t);
            slot_ids.nb[2]       = ids->ne[1] * slot_ids.nb[1];
            slot_ids.nb[3]       = slot_ids.nb[2];

            ggml_tensor op = *dst;
            op.src[0]      = &src0;
            op.src[2]      = &slot_ids;
            hooks.mul_mat_id(ctx, &op, nullptr);
        } break;
        case ggml_cuda_expert_calls::STREAM:
            hooks.mul_mat_id(ctx, dst, &calls);
            break;
    }
    return calls.end();
}

ggml_status ggml_cuda_experts_graph_compute(ggml_backend_t backend, ggml_cgraph * cgraph, const ggml_cuda_expert_hooks & hooks) {
    auto & ctx = *(ggml_backend_cuda_context *) backend->context;

    for (int i = ggml_cuda_experts_find(cgraph, 0); i < cgraph->n_nodes; i = ggml_cuda_experts_find(cgraph, i + 1)) {
        context_of(cgraph->nodes[i]->src[0])->calls.begin_graph();
    }
    for (int i0 = 0, i1; i0 < cgraph->n_nodes; i0 = i1 + 1) {
        i1 = ggml_cuda_experts_find(cgraph, i0);
        if (i0 < i1) {
            ggml_cgraph piece = ggml_graph_view(cgraph, i0, i1);
            piece.uid         = cgraph->uid;

            const ggml_status status = hooks.graph_compute(backend, &piece);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
        if (i1 < cgraph->n_nodes) {
            ggml_tensor * node = cgraph->nodes[i1];
            if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !ggml_is_empty(node) && !mul_mat_id(ctx, node, hooks)) {
                return GGML_STATUS_FAILED;
            }
        }
    }
    return GGML_STATUS_SUCCESS;
}

#endif // defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
