#pragma once

#include "llama-expert-checksum.h"
#include "llama-expert-forecast.h"
#include "llama-expert-io.h"
#include "llama-expert-memory.h"
#include "llama-expert-policy.h"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// Bounded cache of expert weights. Knows nothing of models and graphs: it is given files, the places of the expert
// slices in them, and for every op the experts that the op needs.
//
// A layer (more exactly: one group of expert tensors, a model may have two in a block) has n_slots slots. A slot has
// room for one expert, that is for its slice of every tensor of the group. The policy decides about experts, reads and
// compute are about slices:
//
//   EMPTY    nothing, or bytes that must not be used
//   LOADING  a read into the slice is queued or running; only the reader that has taken it touches the bytes
//   READY    the bytes are those of the file; stays so until the slot is given to another expert
//   FAILED   the read failed; the slot is taken back at the next call of the layer
//
//   EMPTY -> LOADING -> READY -> LOADING (evicted and refilled) ...
//                    -> FAILED -> EMPTY
//
// A call is one evaluation of a layer: up, gate and down (or gate_up and down) with the same ids, each an op. At its
// first op the call looks up all of its experts before any is evicted, and every miss is admitted. With n_slots >= K
// everything that the last token used is therefore still there: hits[t] >= |E[t] n E[t-1]|.
//
// A call that needs more experts than there are slots streams: the experts that are there are used first, then the
// others pass through the remaining slots (the ring), each slice read once per call, a slot refilled only when every
// thread has left it. The ring is the same for all tensors of the group, so that they agree again when the call ends.
//
// Reading ahead: the owner may name experts that a layer will probably need at its next call. They are read when no
// demanded read waits, into slots that the last call of the layer did not use, so that the property above holds. A
// slot is taken at the moment in which a read starts: what has not started when the call comes is forgotten, what has
// started and is needed counts as a hit, an expert that is not whole and not needed gives its slot back.
// What was named is held against what the call then needs. If the owner wants that (judge_ahead), only experts of a layer
// whose names have been good are read; the others are held against the call all the same. A judgement moves no slot.
//
// Loading: before the first call the owner may name experts that are to be in slots. They are read in the order of the
// file, when nothing is demanded or expected, into slots that are free; calls need not wait for the end of that. An
// expert has its slot as soon as the read of its first slice starts, and a call that needs it then demands the slices that
// have not been read. What finds no free slot any more, or a layer that has been streamed, is left out.
//
// A tensor may want its experts in another layout than the file has (repacked for the kernels of this CPU): they are read
// into a staging buffer of the reader and transformed into the slot. Others are read into the slot without a copy.
//
// The slots of a tensor can be an array for the kernels of a GPU: equal distances that are multiples of the type's size, and
// zeros behind every expert. They are in memory of a device then, which readers may or may not be able to write to.
//
// One graph at a time: the owner holds turn() while a graph runs. Two contexts on one model take turns.

// where one tensor of a group lies: expert e is [offs + e*size, offs + (e + 1)*size) of the file
struct llama_expert_tensor_desc {
    std::string name;
    int         file = 0;
    size_t      offs = 0;
    size_t      size = 0; // bytes of one expert

    bool transform = false; // a slot holds the expert as the owner's transform function writes it, in as many bytes

    // for slots in memory of a device: read into staging memory and written from there if transform is set, else read in
    // place, which takes a size that is a multiple of LLAMA_EXPERT_IO_ALIGN
    size_t unit = 0; // the distance of slots is a multiple of this; 0: ordinary memory
    size_t pad  = 0; // zeroed bytes behind an expert
};

// called by reader threads: bytes of an expert as in the file -> as a slot holds them
typedef std::function<void(int group, int tensor, const uint8_t * src, uint8_t * dst)> llama_expert_transform;

struct llama_expert_group_desc {
    int n_expert      = 0;
    int n_expert_used = 0; // K, the least number of slots that can work

    std::vector<llama_expert_tensor_desc> tensors; // in the order in which the graph uses them
};

// text of a failed read: file, tensor, expert, offset and reason
std::string llama_expert_read_error(const llama_expert_files & files, const llama_expert_tensor_desc & desc, int expert, const std::string & reason);

struct llama_expert_counters {
    uint64_t calls          = 0;
    uint64_t calls_streamed = 0;
    uint64_t hits           = 0;
    uint64_t misses         = 0;
    uint64_t evictions      = 0;
    uint64_t hits_ahead     = 0; // of the hits, experts that were read ahead or were being read ahead
    uint64_t bytes_demand   = 0;
    uint64_t bytes_ahead    = 0; // read ahead
    uint64_t bytes_used     = 0; // of these, bytes of experts that the next call needed
    uint64_t reads          = 0;
    uint64_t stall_ns       = 0;
    uint64_t read_ns        = 0;
    uint64_t reads_wrong    = 0; // whose bytes had not the checksum of the expert
    uint64_t ids_ns         = 0; // experts on a device: until the ids of the router were on the host
    uint64_t remap_ns       = 0; // from there to the launch, without stall_ns

    uint64_t forecasts        = 0; // calls before which read_ahead() was told what they would need
    uint64_t forecasts_read   = 0; // of these, read ahead
    uint64_t forecast_experts = 0; // experts that it was told of and that were in no slot
    uint64_t forecast_used    = 0; // of these, what the call needed
    uint64_t forecast_needed  = 0; // what these calls needed that was in no slot
    uint64_t forecast_ns      = 0; // time that the owner took for it
};

class llama_expert_cache {
public:
    // files must outlive the cache. No slot exists before allocate().
    llama_expert_cache(
        const llama_expert_files &           files,
        std::vector<llama_expert_group_desc> groups,
        llama_expert_policy                  policy,
        int                                  n_readers,
        llama_expert_transform               transform = nullptr);
    ~llama_expert_cache();

    llama_expert_cache(const llama_expert_cache &)             = delete;
    llama_expert_cache & operator=(const llama_expert_cache &) = delete;

    // bytes that n_slots slots per layer take, metadata included
    size_t bytes_for(int n_slots) const;

    // bytes of the least number of slots that can work: K in every layer
    size_t bytes_floor() const { return bytes_for(n_slots_min()); }

    size_t bytes_experts() const; // all experts of the model

    int n_slots_min() const;
    int n_slots_max() const;

    // the largest number of slots whose bytes are within the budget, at most n_slots_max(), 0 if below the floor
    int n_slots_for(size_t budget) const;

    // Compare every read with the checksum of the expert; wrong bytes are read once more before that is an error.
    // Called before allocate(), which reads all experts once.
    void verify(llama_expert_checksums::progress report);

    // memory: of the slots of tensors that have a unit, outlives the cache; throws std::runtime_error
    void allocate(int n_slots, llama_expert_memory * memory = nullptr);

    bool verifies() const { return checksums != nullptr; }

    bool transforms() const { return n_staging > 0; }

    // whether every expert has a slot of its own
    bool holds_all() const { return slots_per_layer > 0 && slots_per_layer == n_slots_max(); }

    int n_slots() const { return slots_per_layer; }
    int n_groups() const { return (int) groups.size(); }

    // held while a graph runs
    std::mutex & turn() { return turn_mutex; }

    // calls do not count while this is false (warm-up)
    void set_counting(bool value) { counting = value; }

    // An op on tensor `tensor` of group `group` needs the experts ids[it*stride_token + ik*stride_id] for token it in
    // [0, n_tokens), ik in [0, n_ids). One thread calls this before any thread calls next().
    // Returns true at the first op of a call.
    bool begin(int group, int tensor, const char * ids, int64_t n_ids, int64_t n_tokens, size_t stride_id, size_t stride_token, int n_threads);

    // Called by every thread until it returns a negative number: -1 all experts of the op were returned, -2 a read
    // failed. Every thread gets every expert once. The address holds until the thread's next call.
    int next(int ith, const void ** data);

    // For a device that computes later than it is told to, in place of next() of a single thread: in a call that is
    // streamed the address holds until leave() of the expert, before the next op begins. -3: none is ready and wait is false.
    int  next_held(const void ** data, bool wait);
    void leave(int expert);

    // of the current op
    bool streamed() const { return op_streamed; }

    // address of slot 0 of a tensor with a unit as next() gives it, and the distance of slots
    const void * slots(int group, int tensor, size_t * stride) const;

    void count_device(int group, uint64_t ids_ns, uint64_t remap_ns);

    // the text that last_error() gives from now on
    void set_error(const std::string & text);

    // [n_expert] which experts have a slot before the next call of group ig. Without read_ahead() this follows from the
    // calls alone, not from the time that reads take. The caller holds turn(), and no call is in progress.
    std::vector<bool> resident(int ig);

    // the experts that group ig will probably need at its next call, most likely first; the last word counts
    // t_ns: what it took to find out, for the counters
    void read_ahead(int ig, std::vector<int> experts, uint64_t t_ns = 0);

    // from now on read ahead only what is probably needed indeed
    void judge_ahead();

    // to be asked once before every call of group ig: whether to find out what it will need
    bool wants_ahead(int ig);

    // load these experts, [n_groups] the most valuable first, as many as there are free slots
    void load(const std::vector<std::vector<int>> & experts);

    // return when what load() was given has been read, or could not be
    void wait_loaded();

    // bytes that load() has read so far; no counter has them, because no call has asked for them
    size_t bytes_loaded() const;

    // [n_groups] the experts that have slots, and those that are still to be loaded, the most valuable first
    std::vector<std::vector<int>> hot();

    // whether a call has counted
    bool used() const;

    // il < 0: all layers
    llama_expert_counters counters(int il) const;
    void                  reset_counters();

    // text of the last failed read, "" if there was none; the pointer holds until the calling thread's next call
    const char * last_error() const;

    // for tests: invert one byte of the expert that the policy would keep longest; not in memory that is written to
    bool flip_byte(int il);

private:
    friend struct llama_expert_cache_explorer; // tests/cache_interleavings.cpp of remoe-edge

    enum slice_state : uint8_t {
        SLICE_EMPTY,
        SLICE_LOADING,
        SLICE_READY,
        SLICE_FAILED,
    };

    struct slice {
        int         expert = -1;
        slice_state state  = SLICE_EMPTY;
        bool        ahead  = false; // the read was not demanded
        bool        busy   = false; // streaming: the call has still to use it, the ring waits
        int         n_left = 0;     // streaming: threads that are done with it
    };

    struct tensor {
        llama_expert_tensor_desc desc;
        size_t                   stride   = 0; // bytes of a slot
        uint8_t *                arena    = nullptr;
        size_t                   n_arena  = 0;
        size_t                   n_issued = 0; // streaming: misses whose read was queued

        std::vector<slice> slices; // [n_slots]
    };

    struct group {
        llama_expert_group_desc desc;
        std::vector<tensor>     tensors;

        std::vector<int>  order;     // [n_tensors] in which the graph uses them, as seen
        std::vector<int>  slot_of;   // [n_expert], -1: not in a slot
        std::vector<int>  expert_of; // [n_slots],  -1: free
        std::vector<bool> ahead;     // [n_slots] taken for an expert that is read ahead of the next call

        bool               named = false; // what the next call will need was named
        std::vector<int>   names;         // of these experts, those in no slot
        std::vector<bool>  absent;        // [n_expert] in no slot then
        llama_expert_judge judge;

        std::unique_ptr<llama_expert_ranking> ranking;

        int  n_loading = 0;     // slices demanded, queued or being read
        int  n_ahead   = 0;     // slices being read ahead
        bool dirty     = false; // slices of a slot may disagree: a call was streamed, or a read failed

        // the current call
        std::vector<int> needed;  // distinct experts in order of first use
        std::vector<int> slot;    // [n_expert] slot of a needed expert in this call
        std::vector<int> misses;  // in the order in which they are read
        std::vector<int> ring;    // streaming: slots that the misses pass through
        size_t           n_ops        = 0; // of this call so far
        uint64_t         tensors_done = 0; // bit per tensor
        bool             streamed     = false;

        llama_expert_counters counters;
    };

    struct request {
        int group;
        int tensor;
        int slot;
        int expert;

        bool ahead; // not demanded
        bool load;  // of load(); the slot is not known before the read starts
    };

    // what to read when nothing is demanded
    struct forecast {
        int              group = -1;
        size_t           pos   = 0;
        std::vector<int> experts; // not in a slot

        std::vector<bool> expected; // [n_expert] of these, and of those that are in a slot and had better stay there
    };

    // progress of one thread through the current op
    struct alignas(64) cursor {
        size_t pos = 0;
    };

    const llama_expert_files & files;
    const llama_expert_policy  policy;
    const int                  n_readers;

    const llama_expert_transform transform;

    std::unique_ptr<llama_expert_checksums> checksums; // nullptr: reads are believed
    llama_expert_checksums::progress        report;
    llama_expert_memory *                   memory = nullptr; // of slots on a device

    size_t    n_staging = 0; // bytes of a reader's staging buffer
    uint8_t * staging   = nullptr;

    int slots_per_layer = 0;

    std::atomic<bool> counting{ true };

    bool judging = false;

    std::vector<group> groups;

    std::mutex turn_mutex;

    mutable std::mutex      mutex; // everything below, and the groups
    std::condition_variable cv_work;
    std::condition_variable cv_ready;

    std::deque<request>      queue;
    forecast                 ahead;
    std::deque<request>      loads;               // in the order of the files
    int                      n_reading_ahead = 0; // reads that were not demanded and are running, of all groups
    int                      n_reading_load  = 0; // of these, reads of load()
    size_t                   n_bytes_loaded  = 0;
    bool                     called          = false;
    std::vector<std::thread> readers;
    bool                     stop = false;

    std::string error;

    // the current op
    int                 op_group    = -1;
    int                 op_tensor   = -1;
    int                 op_threads  = 0;
    bool                op_streamed = false;
    std::vector<int>    op_order;      // experts in the order in which they became ready, room for all
    std::atomic<size_t> op_ready{ 0 };  // of these, how many are ready
    std::atomic<bool>   op_failed{ false };
    std::vector<cursor> op_cursors;    // [n_threads]

    // ids of an op as the graph stores them, possibly a strided view
    struct id_view {
        const char * data;
        int64_t      n_ids;
        int64_t      n_tokens;
        size_t       stride_id;
        size_t       stride_token;

        int at(int64_t it, int64_t ik) const { return *(const int32_t *) (data + it * stride_token + ik * stride_id); }
    };

    // all of these are called with the mutex held
    void start_call(std::unique_lock<std::mutex> & lock, int ig, const id_view & ids, std::vector<int> && needed);
    void touch(group & g, const id_view & ids);
    void end_ahead(group & g, const std::vector<bool> & needed);
    void judge(group & g, const std::vector<bool> & needed);
    bool in_flight(const group & g, int slot) const;
    int  find_slot(const group & g, const std::vector<bool> & keep = {}) const;
    void place(group & g, int slot, int expert);
    bool take(request & r);
    bool take_ahead(request & r);
    bool take_load(request & r);
    void plan_resident(std::unique_lock<std::mutex> & lock, int ig);
    void plan_streamed(int ig);
    void issue_streamed(int ig, int it);
    void enqueue(int ig, int it, int slot, int expert);
    void settle(group & g);

    std::vector<llama_expert_group_desc> descs() const;

    uint8_t *   data(const tensor & t, int slot, int expert) const;
    std::string read(const request & r, int ir, int & n_wrong) const;

    int  advance(int ith, const void ** data, bool wait);
    void reader_main(int ir);
};
