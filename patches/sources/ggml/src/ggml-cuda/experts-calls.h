#pragma once

#include "ggml-cuda-experts.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

// One MUL_MAT_ID after another on experts that a source has: what the host does between the router and the kernels.
// No CUDA here, the device is an interface, so that a test can have one of its own (tests/test-expert-cuda.cpp).
//
// The device is told to compute and does it later. Three rules keep it from computing with wrong bytes:
//   - a kernel is launched when the bytes of its experts are there: the host waits for them;
//   - a call begins, and slots may get other experts, when all kernels that were launched on slots have ended, in
//     whichever stream. The ids of the router come later in the stream than the kernels of the layer before, so for a
//     single context this is no additional wait;
//   - an expert that shares its slot within the op (streaming) is left when the event after its kernels was reached.

// ids of an op as the graph has them on the device
struct ggml_cuda_expert_ids {
    const void * data;
    int64_t      n_ids;
    int64_t      n_tokens;
    size_t       stride_token; // bytes

    size_t n() const { return n_ids * n_tokens; }
};

// Functions return false if the device failed, error() says why. A stream is what the caller of begin() names so.
struct ggml_cuda_expert_device {
    virtual ~ggml_cuda_expert_device() = default;

    // two arrays in host memory that the device can reach, for n numbers each; the device is not using them
    virtual bool reserve(size_t n, int32_t ** ids, int32_t ** slots) = 0;

    // in stream order: ids to the host, densely
    virtual bool download(void * stream, const ggml_cuda_expert_ids & ids, int32_t * dst) = 0;

    // in stream order: slots of n ids to where kernels read them
    virtual bool upload(void * stream, const int32_t * slots, size_t n, const int32_t ** dst) = 0;

    // the event is reached when all that was put into the stream before is done
    virtual bool record(void * stream, int event)   = 0;
    virtual bool wait(int event)                    = 0; // on the host
    virtual bool reached(int event, bool * reached) = 0;

    // where kernels see memory of slots
    virtual const void * address(const void * slot) = 0;

    virtual std::string error() const = 0;
};

class ggml_cuda_expert_calls {
public:
    enum result {
        FAILED,
        SLOTS,  // launch one op on slots() with ids(), then call end()
        STREAM, // launch one matrix product for every expert that next() returns, then call end()
    };

    static constexpr int N_IN_FLIGHT = 4; // experts of a streamed op that the device may have before it
    static constexpr int N_EVENTS    = 2 + N_IN_FLIGHT;

    ggml_cuda_expert_calls(const ggml_cuda_expert_source & source, ggml_cuda_expert_device & device) : source(source), device(device) {}

    // a graph starts: ids of earlier graphs are no longer known
    void begin_graph() { tensor_ids = nullptr; }

    // key: whose ids these are, op->src[2]
    // one_by_one: the kernels of this op take one expert at a time, also if there are slots for all
    result begin(void * stream, const ggml_tensor * op, const ggml_tensor * key, const ggml_cuda_expert_ids & ids, bool one_by_one) {
        this->stream = stream;

        const uint64_t t_begin = now_ns();
        uint64_t       t_ids   = t_begin;

        if (key != tensor_ids) {
            if (!fetch(ids)) {
                return fail();
            }
            tensor_ids = key;
            t_ids      = now_ns();
        }

        streams = !source.begin(source.user, op, chosen);
        if (streams || one_by_one) {
            source.timed(source.user, op, t_ids - t_begin, now_ns() - t_ids);
            return STREAM;
        }

        const ggml_cuda_expert_slots s = source.slots(source.user, op->src[0]);

        const uint64_t t_wait = now_ns();
        const void *   data   = nullptr;
        int            expert;
        while ((expert = source.next(source.user, true, &data)) >= 0) {
            if ((size_t) expert >= slot_of.size()) {
                slot_of.resize(expert + 1);
            }
            slot_of[expert] = ((const char *) data - (const char *) s.base) / s.stride;
        }
        const uint64_t t_ready = now_ns();
        if (expert != -1) {
            tensor_ids = nullptr;
            return FAILED; // the source knows why
        }
        res_slots      = s;
        res_slots.base = device.address(s.base);
        if (res_slots.base == nullptr || !remap(ids.n())) {
            return fail();
        }
        source.timed(source.user, op, t_ids - t_begin, (now_ns() - t_ids) - (t_ready - t_wait));

        return SLOTS;
    }

    const ggml_cuda_expert_slots & slots() const { return res_slots; }

    const int32_t * ids() const { return res_ids; }

    // STREAM: what was launched since the last call was for the expert that it returned
    // as ggml_cuda_expert_source::next; the device's address holds for what is launched before the next call
    int next(const void ** data) {
        int expert = -2;
        if (!try_next(&expert, data)) {
            fail();
        }
        failed = failed || expert == -2;
        return expert;
    }

    // the op was launched, or a part of it before something failed; false: it failed
    bool end() {
        bool ok = launched_current();
        // the next op of the source is another one: what the device has of this one has to be left first
        while (!in_flight.empty()) {
            ok = leave_front() && ok;
        }
        ok       = device.record(stream, EVENT_LAUNCHED) && ok;
        launched = true;
        if (!ok) {
            fail();
        }
        ok     = ok && !failed;
        failed = false;
        if (!ok) {
            tensor_ids = nullptr;
        }
        return ok;
    }

private:
    enum { EVENT_IDS,
        EVENT_LAUNCHED,
        EVENT_IN_FLIGHT };

    struct flight {
        int expert;
        int event;
    };

    const ggml_cuda_expert_source source;
    ggml_cuda_expert_device &     device;

    void * stream = nullptr;

    const ggml_tensor * tensor_ids = nullptr; // the tensor whose ids are in chosen
    size_t              n_reserved = 0;
    int32_t *           chosen     = nullptr; // [n] expert ids as the router chose them
    int32_t *           uploaded   = nullptr; // [n] slot numbers as the device has them
    size_t              n_uploaded = 0;
    bool                launched   = false;   // ever
    bool                streams    = false;   // the op needs more experts than there are slots
    bool                failed     = false;   // the streamed op

    std::vector<int32_t> slot_of; // [n_expert]
    std::vector<int32_t> remapped;

    ggml_cuda_expert_slots res_slots = {};
    const int32_t *        res_ids   = nullptr;

    std::deque<flight> in_flight;
    int                current   = -1; // the expert that next() has returned
    int                n_flights = 0;  // so far

    static uint64_t now_ns() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

    result fail() {
        tensor_ids = nullptr;
        source.failed(source.user, device.error().c_str());
        return FAILED;
    }

    // the ids of a call to the host; when they are there, nothing that was launched on slots is running
    bool fetch(const ggml_cuda_expert_ids & ids) {
        if (ids.n() > n_reserved) {
            if (launched && !device.wait(EVENT_LAUNCHED)) {
                return false;
            }
            n_reserved = 0;
            if (!device.reserve(ids.n(), &chosen, &uploaded)) {
                return false;
            }
            n_reserved = ids.n();
        }
        n_uploaded = 0;
        return device.download(stream, ids, chosen) && device.record(stream, EVENT_IDS) &&
            (!launched || device.wait(EVENT_LAUNCHED)) && device.wait(EVENT_IDS);
    }

    // the slots of the chosen experts to the device, if it has not got them from an earlier op of the call
    bool remap(size_t n) {
        remapped.resize(n);
        for (size_t i = 0; i < n; i++) {
            remapped[i] = slot_of[chosen[i]];
        }
        if (n_uploaded == n && std::equal(remapped.begin(), remapped.end(), uploaded)) {
            return true;
        }
        if (n_uploaded > 0 && !device.wait(EVENT_LAUNCHED)) {
            return false; // kernels of the earlier op may still read the other ones
        }
        std::copy(remapped.begin(), remapped.end(), uploaded);
        n_uploaded = 0;
        if (!device.upload(stream, uploaded, n, &res_ids)) {
            return false;
        }
        n_uploaded = n;
        return true;
    }

    // what next() has returned was launched
    bool launched_current() {
        if (current < 0) {
            return true;
        }
        const int event = EVENT_IN_FLIGHT + n_flights++ % N_IN_FLIGHT;
        in_flight.push_back({ current, event });
        current = -1;
        return device.record(stream, event);
    }

    // the slot of the expert that was launched first may be filled again
    bool leave_front() {
        const bool ok = device.wait(in_flight.front().event);
        if (streams) {
            source.leave(source.user, in_flight.front().expert);
        }
        in_flight.pop_front();
        return ok;
    }

    bool try_next(int * expert, const void ** data) {
        if (!launched_current()) {
            return false;
        }
        while (true) {
            bool reached = false;
            while (!in_flight.empty()) {
                if (!device.reached(in_flight.front().event, &reached)) {
                    return false;
                }
                if (!reached) {
                    break;
                }
                if (!leave_front()) {
                    return false;
                }
            }
            // The source may have to wait until a slot is left, which is for us to do: it may wait for storage, and for
            // that without an expert in flight only.
            int res = -3;
            if (in_flight.size() < N_IN_FLIGHT) {
                res = source.next(source.user, in_flight.empty(), data);
            }
            if (res == -3) {
                if (!leave_front()) {
                    return false;
                }
                continue;
            }
            if (res >= 0) {
                *data = device.address(*data);
                if (*data == nullptr) {
                    return false;
                }
                current = res;
            }
            *expert = res;
            return true;
        }
    }
};
