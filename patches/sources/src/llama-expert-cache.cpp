#include "llama-expert-cache.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cstring>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

static uint64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static size_t round_up(size_t x, size_t n) {
    return (x + n - 1) / n * n;
}

// bytes of a slot: any expert of the tensor, aligned as direct reads want it
static size_t slot_stride(const llama_expert_tensor_desc & desc) {
    if (desc.unit > 0) {
        // every expert has the place in its slot that the first one has
        const size_t head  = desc.transform ? 0 : desc.offs % LLAMA_EXPERT_IO_ALIGN;
        const size_t align = desc.transform ? 128 : LLAMA_EXPERT_IO_ALIGN;

        return round_up(head + desc.size + desc.pad, std::lcm(align, desc.unit));
    }
    if (desc.transform) {
        return round_up(desc.size, 64);
    }
    if (desc.offs % LLAMA_EXPERT_IO_ALIGN == 0 && desc.size % LLAMA_EXPERT_IO_ALIGN == 0) {
        return desc.size;
    }
    // the worst case over all offsets
    return llama_expert_files::extent(LLAMA_EXPERT_IO_ALIGN - 1, desc.size);
}

llama_expert_cache::llama_expert_cache(
    const llama_expert_files &           files,
    std::vector<llama_expert_group_desc> descs,
    llama_expert_policy                  policy,
    int                                  n_readers,
    llama_expert_transform               transform) : files(files), policy(policy), n_readers(n_readers), transform(std::move(transform)) {
    for (auto & desc : descs) {
        for (const auto & t : desc.tensors) {
            // the ends were checked when the file was opened, a file from a stranger may still lie about products
            if (t.size == 0 || desc.n_expert <= 0 || t.size > files.size(t.file) / desc.n_expert ||
                t.offs > files.size(t.file) - t.size * desc.n_expert) {
                throw std::runtime_error("tensor " + t.name + " does not lie within " + files.name(t.file));
            }
        }
        groups.emplace_back();
        group & g = groups.back();
        g.slot_of.assign(desc.n_expert, -1);
        g.slot.assign(desc.n_expert, -1);
        for (const auto & t : desc.tensors) {
            g.tensors.emplace_back();
            g.tensors.back().desc   = t;
            g.tensors.back().stride = slot_stride(t);
            g.order.push_back(g.order.size());
            if (t.transform) {
                // whole large pages
                n_staging = std::max(n_staging, round_up(t.size + 2 * LLAMA_EXPERT_IO_ALIGN, 2 * 1024 * 1024));
            }
        }
        g.desc = std::move(desc);
    }
}

llama_expert_cache::~llama_expert_cache() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        stop = true;
    }
    cv_work.notify_all();
    for (auto & reader : readers) {
        reader.join();
    }
#ifdef __linux__
    for (auto & g : groups) {
        for (auto & t : g.tensors) {
            if (t.arena != nullptr && memory != nullptr) {
                memory->free(t.arena, t.n_arena);
            } else if (t.arena != nullptr) {
                munmap(t.arena, t.n_arena);
            }
        }
    }
    if (staging != nullptr && memory != nullptr) {
        memory->free_staging(staging, n_readers * n_staging);
    } else if (staging != nullptr) {
        munmap(staging, n_readers * n_staging);
    }
#endif
}

int llama_expert_cache::n_slots_min() const {
    int res = 0;
    for (const auto & g : groups) {
        res = std::max(res, std::min(g.desc.n_expert, g.desc.n_expert_used));
    }
    return res;
}

int llama_expert_cache::n_slots_max() const {
    int res = 0;
    for (const auto & g : groups) {
        res = std::max(res, g.desc.n_expert);
    }
    return res;
}

size_t llama_expert_cache::bytes_for(int n_slots) const {
    size_t res = sizeof(*this) + n_readers * (64 * 1024 + n_staging); // what a reader thread touches of its stack
    res += checksums ? checksums->bytes() : 0;
    for (const auto & g : groups) {
        const int n = std::min(n_slots, g.desc.n_expert);

        res += sizeof(g) + llama_expert_ranking::bytes(policy, g.desc.n_expert, g.desc.n_expert_used, n) +
            g.desc.n_expert * 7 * sizeof(int) + n * 3 * sizeof(int);
        for (const auto & t : g.tensors) {
            res += sizeof(t) + n * (t.stride + sizeof(slice) + sizeof(request)) + LLAMA_EXPERT_IO_ALIGN;
        }
    }
    return res;
}

size_t llama_expert_cache::bytes_experts() const {
    size_t res = 0;
    for (const auto & g : groups) {
        for (const auto & t : g.tensors) {
            res += g.desc.n_expert * t.desc.size;
        }
    }
    return res;
}

int llama_expert_cache::n_slots_for(size_t budget) const {
    int res = 0;
    for (int n = n_slots_min(); n <= n_slots_max() && bytes_for(n) <= budget; n++) {
        res = n;
    }
    return res;
}

#ifdef __linux__
static uint8_t * allocated(uint8_t * addr, size_t size, const std::string & what) {
    if (addr == nullptr) {
        throw std::runtime_error("cannot allocate " + std::to_string(size) + " bytes on the device for " + what + ": use a smaller --expert-cache");
    }
    return addr;
}

// memory in large pages, taken now and not at the first use
// Direct reads pin the pages that they fill: with large ones that is a fifth faster, see docs/performance.md.
static uint8_t * allocate_pages(size_t size, const std::string & what) {
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
    void * addr = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (addr == MAP_FAILED) {
        throw std::runtime_error("cannot allocate " + std::to_string(size) + " bytes for " + what);
    }
    (void) madvise(addr, size, MADV_HUGEPAGE);
    (void) madvise(addr, size, MADV_POPULATE_WRITE); // kernels before 5.14 take the pages at the first use
    return (uint8_t *) addr;
}
#endif

void llama_expert_cache::verify(llama_expert_checksums::progress report) {
    this->report = std::move(report);
    checksums    = std::make_unique<llama_expert_checksums>(descs());
}

std::vector<llama_expert_group_desc> llama_expert_cache::descs() const {
    std::vector<llama_expert_group_desc> res;
    for (const auto & g : groups) {
        res.push_back(g.desc);
    }
    return res;
}

void llama_expert_cache::allocate(int n_slots, llama_expert_memory * memory) {
    assert(slots_per_layer == 0 && n_slots >= n_slots_min());

    this->memory = memory;

    if (checksums) {
        checksums->sweep(files, descs(), n_readers, report); // its buffers are gone before there are slots
    }

    size_t n_needed_max = 0;
    for (auto & g : groups) {
        const int n = std::min(n_slots, g.desc.n_expert);

        g.expert_of.assign(n, -1);
        g.ahead.assign(n, false);
        g.ranking = llama_expert_ranking::make(policy, g.desc.n_expert, g.desc.n_expert_used, n);
        for (auto & t : g.tensors) {
            t.n_arena = n * t.stride;
#ifdef __linux__
            t.arena = memory ? allocated(memory->alloc(t.n_arena), t.n_arena, "slots of " + t.desc.name)
                             : allocate_pages(t.n_arena, "slots of " + t.desc.name);
#endif
            t.slices.resize(n);
        }
        n_needed_max = std::max(n_needed_max, (size_t) g.desc.n_expert);
    }
    op_order.reserve(n_needed_max);

#ifdef __linux__
    if (n_staging > 0) {
        staging = memory ? allocated(memory->alloc_staging(n_readers * n_staging), n_readers * n_staging, "staging")
                         : allocate_pages(n_readers * n_staging, "staging");
    }
#endif
    slots_per_layer = n_slots;

    for (int i = 0; i < n_readers; i++) {
        readers.emplace_back([this, i] { reader_main(i); });
    }
}

//
// calls
//

// tell the policy of a call, token by token; within a token experts that are there come first
void llama_expert_cache::touch(group & g, const id_view & ids) {
    std::vector<int> ranked(ids.n_ids);
    std::vector<int> used(ids.n_ids);
    for (int64_t it = 0; it < ids.n_tokens; it++) {
        for (int64_t ik = 0; ik < ids.n_ids; ik++) {
            ranked[ik] = ids.at(it, ik);
        }
        const auto missing = std::copy_if(ranked.begin(), ranked.end(), used.begin(), [&g](int e) { return g.slot_of[e] != -1; });
        std::copy_if(ranked.begin(), ranked.end(), missing, [&g](int e) { return g.slot_of[e] == -1; });
        g.ranking->use(ranked.data(), used.data(), ids.n_ids);
    }
}

void llama_expert_cache::enqueue(int ig, int it, int slot, int expert) {
    group & g = groups[ig];
    slice & s = g.tensors[it].slices[slot];

    s        = {};
    s.expert = expert;
    s.state  = SLICE_LOADING;
    s.busy   = true;

    g.n_loading++;

    // the tensor that the graph needs first is read first
    const auto rank = [&g](int it) { return std::find(g.order.begin(), g.order.end(), it); };
    const auto pos  = std::find_if(queue.begin(), queue.end(), [&](const request & r) { return rank(r.tensor) > rank(it); });
    queue.insert(pos, { ig, it, slot, expert, false, false });
}

// after a streamed or failed call: keep the slots whose slices agree
void llama_expert_cache::settle(group & g) {
    std::fill(g.slot_of.begin(), g.slot_of.end(), -1);
    for (size_t slot = 0; slot < g.expert_of.size(); slot++) {
        const int expert = g.tensors[0].slices[slot].expert;

        const bool whole = expert != -1 && std::all_of(g.tensors.begin(), g.tensors.end(), [&](const tensor & t) {
            return t.slices[slot].expert == expert && t.slices[slot].state == SLICE_READY;
        });
        if (whole) {
            g.slot_of[expert] = slot;
        } else {
            for (auto & t : g.tensors) {
                t.slices[slot] = {};
            }
        }
        g.expert_of[slot] = whole ? expert : -1;
        g.ahead[slot]     = false;
    }
    g.dirty = false;
}

// the call has come: account for what was read ahead of it, and take back the slots of what is neither needed nor whole
void llama_expert_cache::end_ahead(group & g, const std::vector<bool> & needed) {
    for (size_t slot = 0; slot < g.ahead.size(); slot++) {
        if (!g.ahead[slot]) {
            continue;
        }
        const int expert = g.expert_of[slot];

        size_t n_bytes   = 0;
        bool   whole     = true;
        bool   in_flight = false;
        for (const auto & t : g.tensors) {
            const slice & s = t.slices[slot];
            whole           = whole && s.state == SLICE_READY;
            in_flight       = in_flight || s.state == SLICE_LOADING;
            n_bytes += s.ahead ? t.desc.size : 0;
        }
        if (needed[expert]) {
            if (counting) {
                g.counters.hits_ahead++;
                g.counters.bytes_used += n_bytes;
            }
        } else if (in_flight) {
            continue; // the next call looks at it again
        } else if (!whole) {
            place(g, slot, -1);
        }
        g.ahead[slot] = false;
    }
}

// the call has come: hold what was named before it against what it needs
void llama_expert_cache::judge(group & g, const std::vector<bool> & needed) {
    if (!g.named) {
        return;
    }
    int n_used = 0, n_needed = 0;
    for (const int expert : g.names) {
        n_used += needed[expert];
    }
    for (int expert = 0; expert < g.desc.n_expert; expert++) {
        n_needed += needed[expert] && g.absent[expert];
    }
    if (counting) {
        g.counters.forecasts++;
        g.counters.forecasts_read += !judging || g.judge.pays;
        g.counters.forecast_experts += g.names.size();
        g.counters.forecast_used += n_used;
        g.counters.forecast_needed += n_needed;
    }
    g.judge.score(g.names.size(), n_used);
    g.named = false;
}

// whether a read into the slot is queued or running
bool llama_expert_cache::in_flight(const group & g, int slot) const {
    return std::any_of(g.tensors.begin(), g.tensors.end(), [slot](const tensor & t) { return t.slices[slot].state == SLICE_LOADING; });
}

// a free slot, else that of the expert that the policy values least; experts of the last call keep theirs, and so do those
// that are read ahead or being loaded; -1: none can be had
int llama_expert_cache::find_slot(const group & g, const std::vector<bool> & keep) const {
    int res = -1;
    for (int slot = 0; slot < (int) g.expert_of.size(); slot++) {
        const int expert = g.expert_of[slot];
        if (expert == -1) {
            return slot;
        }
        if (!keep.empty() && keep[expert]) {
            continue;
        }
        if (g.slot[expert] == -1 && !g.ahead[slot] && !in_flight(g, slot) && (res == -1 || g.ranking->less_valuable(expert, g.expert_of[res]))) {
            res = slot;
        }
    }
    return res;
}

// give a slot to an expert that has yet to be read, -1: to none
void llama_expert_cache::place(group & g, int slot, int expert) {
    if (g.expert_of[slot] != -1) {
        g.slot_of[g.expert_of[slot]] = -1;
    }
    g.expert_of[slot] = expert;
    if (expert != -1) {
        g.slot_of[expert] = slot;
    }
    for (auto & t : g.tensors) {
        t.slices[slot]        = {};
        t.slices[slot].expert = expert;
    }
}

void llama_expert_cache::start_call(std::unique_lock<std::mutex> & lock, int ig, const id_view & ids, std::vector<int> && needed) {
    group & g = groups[ig];

    const bool streamed = needed.size() > g.expert_of.size();

    // what was to be read ahead and has not started is not read
    if (ahead.group == ig) {
        ahead.group = -1;
    }
    if (streamed) {
        // all slots will be written anew
        loads.erase(std::remove_if(loads.begin(), loads.end(), [ig](const request & r) { return r.group == ig; }), loads.end());
    }
    // reads of a call that did not come to its end; nothing may move under a read
    cv_ready.wait(lock, [&] { return g.n_loading == 0 && (g.n_ahead == 0 || (!g.dirty && !streamed)); });

    std::vector<bool> is_needed(g.desc.n_expert, false);
    for (const int expert : needed) {
        is_needed[expert] = true;
    }
    judge(g, is_needed);
    end_ahead(g, is_needed);

    if (g.dirty || streamed) {
        settle(g);
    }

    for (const int expert : g.needed) {
        g.slot[expert] = -1;
    }
    g.needed = std::move(needed);
    g.misses.clear();
    for (const int expert : g.needed) {
        g.slot[expert] = g.slot_of[expert];
        if (g.slot_of[expert] == -1) {
            g.misses.push_back(expert);
        }
    }
    g.tensors_done = 0;
    g.n_ops        = 0;
    g.streamed     = streamed;

    if (g.expert_of.size() < g.slot_of.size()) {
        touch(g, ids); // else nothing is ever evicted
    }

    if (counting) {
        called = true;
        g.counters.calls++;
        g.counters.calls_streamed += g.streamed;
        g.counters.hits += g.needed.size() - g.misses.size();
        g.counters.misses += g.misses.size();

        const size_t n_free = std::count(g.expert_of.begin(), g.expert_of.end(), -1);
        g.counters.evictions += g.misses.size() - std::min(n_free, g.misses.size());
    }

    if (g.streamed) {
        plan_streamed(ig);
    } else {
        plan_resident(lock, ig);
    }
    cv_work.notify_all();
}

// everything fits: a slot for every miss, none of them taken from an expert of this call
void llama_expert_cache::plan_resident(std::unique_lock<std::mutex> & lock, int ig) {
    group & g = groups[ig];

    for (const int expert : g.misses) {
        int slot = find_slot(g);
        if (slot == -1) {
            // the slots that are left are being filled with experts that were expected, or loaded, and are not needed
            cv_ready.wait(lock, [&g] { return g.n_ahead == 0; });
            std::vector<bool> is_needed(g.desc.n_expert, false);
            for (const int e : g.needed) {
                is_needed[e] = true;
            }
            end_ahead(g, is_needed);
            slot = find_slot(g);
        }
        assert(slot != -1);

        place(g, slot, expert);
        g.slot[expert] = slot;
    }
    for (const int it : g.order) {
        for (const int expert : g.needed) {
            if (g.tensors[it].slices[g.slot[expert]].state == SLICE_EMPTY) {
                enqueue(ig, it, g.slot[expert], expert);
            }
        }
    }
}

// more experts than slots: the most valuable stay where they are, the misses pass through the other slots, so that the
// most valuable of them are read last and are there when the next call comes
void llama_expert_cache::plan_streamed(int ig) {
    group & g = groups[ig];

    const auto less = [&](int a, int b) { return g.ranking->less_valuable(a, b); };

    // at least as many slots in the ring as keep the readers busy while compute holds one
    const int n_slots = g.expert_of.size();
    const int n_ring  = std::min(n_slots, std::max(n_slots / 2, n_readers + 1));

    // the policy's choice among all experts, needed or there
    std::vector<int> best = g.misses;
    for (const int expert : g.expert_of) {
        if (expert != -1) {
            best.push_back(expert);
        }
    }
    std::sort(best.begin(), best.end(), [&](int a, int b) { return less(b, a); });

    std::vector<bool> keep(n_slots, false);
    int               n_keep = 0;
    for (int i = 0; i < (int) best.size() && i < n_slots && n_keep < n_slots - n_ring; i++) {
        if (g.slot_of[best[i]] != -1) {
            keep[g.slot_of[best[i]]] = true;
            n_keep++;
        }
    }

    // slots that hold nothing the call needs can be refilled at once and come first
    g.ring.clear();
    for (const bool hit : { false, true }) {
        for (int slot = 0; slot < n_slots; slot++) {
            const int expert = g.expert_of[slot];
            if ((expert != -1 && g.slot[expert] != -1) != hit) {
                continue;
            }
            if (!keep[slot]) {
                g.ring.push_back(slot);
            }
            for (auto & t : g.tensors) {
                t.slices[slot].busy   = hit && !keep[slot];
                t.slices[slot].n_left = 0;
            }
        }
    }

    std::sort(g.misses.begin(), g.misses.end(), less);
    for (size_t i = 0; i < g.misses.size(); i++) {
        g.slot[g.misses[i]] = g.ring[i % g.ring.size()];
    }

    g.dirty = true;
    for (int it = 0; it < (int) g.tensors.size(); it++) {
        g.tensors[it].n_issued = 0;
        issue_streamed(ig, it);
    }
}

// queue the reads whose slots the threads have left
void llama_expert_cache::issue_streamed(int ig, int it) {
    group &  g = groups[ig];
    tensor & t = g.tensors[it];

    while (t.n_issued < g.misses.size()) {
        const int expert = g.misses[t.n_issued];
        if (t.slices[g.slot[expert]].busy) {
            break;
        }
        enqueue(ig, it, g.slot[expert], expert);
        t.n_issued++;
    }
}

bool llama_expert_cache::begin(int ig, int it, const char * data, int64_t n_ids, int64_t n_tokens, size_t stride_id, size_t stride_token, int n_threads) {
    std::unique_lock<std::mutex> lock(mutex);

    group &  g = groups[ig];
    tensor & t = g.tensors[it];

    const id_view ids = { data, n_ids, n_tokens, stride_id, stride_token };

    std::vector<int>  needed;
    std::vector<bool> seen(g.desc.n_expert, false);
    for (int64_t i = 0; i < n_tokens; i++) {
        for (int64_t k = 0; k < n_ids; k++) {
            const int expert = ids.at(i, k);
            if (!seen[expert]) {
                seen[expert] = true;
                needed.push_back(expert);
            }
        }
    }

    const bool   first = g.tensors_done == 0 || ((g.tensors_done >> it) & 1) != 0 || needed != g.needed;
    const size_t i_op  = first ? 0 : g.n_ops;

    // not every architecture uses gate and up in the same order
    if (i_op < g.order.size() && g.order[i_op] != it) {
        g.order.erase(std::find(g.order.begin(), g.order.end(), it));
        g.order.insert(g.order.begin() + i_op, it);
    }
    if (first) {
        start_call(lock, ig, ids, std::move(needed));
    }
    g.n_ops++;
    g.tensors_done |= (uint64_t) 1 << it;

    op_group    = ig;
    op_tensor   = it;
    op_threads  = n_threads;
    op_streamed = g.streamed;
    op_order.assign(g.needed.size(), -1);
    op_cursors.assign(n_threads, {});

    // what is there already; experts in the ring first, so that their slots come free early
    size_t n_ready = 0;
    bool   failed  = false;
    for (const bool in_ring : { true, false }) {
        for (const int expert : g.needed) {
            const slice & s = t.slices[g.slot[expert]];
            if (s.expert != expert || (g.streamed && s.busy) != in_ring) {
                continue;
            }
            if (s.state == SLICE_READY) {
                op_order[n_ready++] = expert;
            }
            failed = failed || s.state == SLICE_FAILED;
        }
    }
    op_ready.store(n_ready);
    op_failed.store(failed);

    return first;
}

int llama_expert_cache::next(int ith, const void ** data) {
    const cursor & c = op_cursors[ith];

    if (op_streamed && c.pos > 0) {
        leave(op_order[c.pos - 1]);
    }
    return advance(ith, data, true);
}

int llama_expert_cache::next_held(const void ** data, bool wait) {
    return advance(0, data, wait);
}

int llama_expert_cache::advance(int ith, const void ** data, bool wait) {
    cursor & c = op_cursors[ith];

    if (c.pos == op_order.size()) {
        return -1;
    }

    const group &  g = groups[op_group];
    const tensor & t = g.tensors[op_tensor];

    if (c.pos >= op_ready.load(std::memory_order_acquire)) {
        if (!wait && !op_failed.load()) {
            return -3;
        }
        std::unique_lock<std::mutex> lock(mutex);

        const uint64_t t_start = now_ns();
        cv_ready.wait(lock, [&] { return c.pos < op_ready.load() || op_failed.load(); });
        if (ith == 0 && counting) {
            groups[op_group].counters.stall_ns += now_ns() - t_start;
        }
        if (c.pos >= op_ready.load()) {
            return -2;
        }
    }

    const int expert = op_order[c.pos++];

    *data = this->data(t, g.slot[expert], expert);

    return expert;
}

// where the bytes of an expert are that has that slot
uint8_t * llama_expert_cache::data(const tensor & t, int slot, int expert) const {
    uint8_t * res = t.arena + slot * t.stride;

    return t.desc.transform ? res : res + (t.desc.offs + expert * t.desc.size) % LLAMA_EXPERT_IO_ALIGN;
}

// streaming: when the last thread has left an expert, its slot can take the next one
void llama_expert_cache::leave(int expert) {
    std::lock_guard<std::mutex> lock(mutex);

    const group & g = groups[op_group];
    slice &       s = groups[op_group].tensors[op_tensor].slices[g.slot[expert]];

    if (s.busy && ++s.n_left == op_threads) {
        s.busy = false;
        issue_streamed(op_group, op_tensor);
        cv_work.notify_all();
    }
}

//
// readers
//

std::vector<bool> llama_expert_cache::resident(int ig) {
    std::unique_lock<std::mutex> lock(mutex);

    group & g = groups[ig];
    if (g.dirty) {
        // a slot that was streamed through, or whose read failed: what is in it now?
        cv_ready.wait(lock, [&g] { return g.n_loading == 0 && g.n_ahead == 0; });
        settle(g);
    }
    std::vector<bool> res(g.desc.n_expert);
    for (int e = 0; e < g.desc.n_expert; e++) {
        res[e] = g.slot_of[e] != -1;
    }
    return res;
}

void llama_expert_cache::judge_ahead() {
    std::lock_guard<std::mutex> lock(mutex);

    judging = true;
}

bool llama_expert_cache::wants_ahead(int ig) {
    std::lock_guard<std::mutex> lock(mutex);

    groups[ig].named = false; // by a graph that did not get to the call

    return !judging || (!holds_all() && groups[ig].judge.wants());
}

void llama_expert_cache::read_ahead(int ig, std::vector<int> experts, uint64_t t_ns) {
    std::lock_guard<std::mutex> lock(mutex);

    group & g = groups[ig];
    g.counters.forecast_ns += counting ? t_ns : 0;
    if (g.n_loading > 0 || (g.dirty && g.n_ahead > 0)) {
        return; // its last call failed
    }
    if (g.dirty) {
        settle(g);
        for (const int expert : g.needed) {
            g.slot[expert] = -1;
        }
        g.needed.clear();
    }
    std::vector<bool> expected(g.desc.n_expert, false);
    for (const int expert : experts) {
        expected[expert] = true;
    }
    experts.erase(std::remove_if(experts.begin(), experts.end(), [&g](int e) { return g.slot_of[e] != -1; }), experts.end());

    g.named = true;
    g.names = experts;
    g.absent.assign(g.desc.n_expert, false);
    for (int e = 0; e < g.desc.n_expert; e++) {
        g.absent[e] = g.slot_of[e] == -1;
    }
    if (!experts.empty() && (!judging || g.judge.pays)) {
        ahead = { ig, 0, std::move(experts), std::move(expected) };
        cv_work.notify_all();
    }
}

// the next read: what is demanded, else what is expected, else what is to be loaded
bool llama_expert_cache::take(request & r) {
    if (queue.empty()) {
        return take_ahead(r) || take_load(r);
    }
    r = queue.front();
    queue.pop_front();

    return true;
}

bool llama_expert_cache::take_ahead(request & r) {
    // a demanded read must not wait behind many that are not
    if (n_reading_ahead >= std::max(1, n_readers / 2)) {
        return false;
    }
    while (ahead.group != -1 && ahead.pos < ahead.experts.size()) {
        group &   g      = groups[ahead.group];
        const int expert = ahead.experts[ahead.pos];

        if (g.slot_of[expert] == -1) {
            const int slot = find_slot(g, ahead.expected);
            if (slot == -1) {
                break;
            }
            if (counting && g.expert_of[slot] != -1) {
                g.counters.evictions++;
            }
            place(g, slot, expert);
            g.ahead[slot] = true;
        }
        const int slot = g.slot_of[expert];
        for (const int it : g.order) {
            slice & s = g.tensors[it].slices[slot];
            if (g.ahead[slot] && s.state == SLICE_EMPTY) {
                s.state = SLICE_LOADING;
                s.ahead = true;
                g.n_ahead++;
                n_reading_ahead++;
                r = { ahead.group, it, slot, expert, true, false };
                return true;
            }
        }
        ahead.pos++;
    }
    ahead.group = -1;

    return false;
}

//
// loading
//

void llama_expert_cache::load(const std::vector<std::vector<int>> & experts) {
    std::lock_guard<std::mutex> lock(mutex);

    for (int ig = 0; ig < (int) groups.size(); ig++) {
        const group & g = groups[ig];
        const size_t  n = std::min(experts[ig].size(), g.expert_of.size());
        for (int it = 0; it < (int) g.tensors.size(); it++) {
            for (size_t i = 0; i < n; i++) {
                loads.push_back({ ig, it, -1, experts[ig][i], true, true });
            }
        }
    }
    const auto place = [this](const request & r) {
        const auto & desc = groups[r.group].tensors[r.tensor].desc;
        return std::make_pair(desc.file, desc.offs + r.expert * desc.size);
    };
    std::sort(loads.begin(), loads.end(), [&](const request & a, const request & b) { return place(a) < place(b); });
    cv_work.notify_all();
}

bool llama_expert_cache::take_load(request & r) {
    // before the first call nobody has to wait behind these
    if (called && n_reading_ahead >= std::max(1, n_readers / 2)) {
        return false;
    }
    const bool had_loads = !loads.empty();
    while (!loads.empty()) {
        r = loads.front();
        loads.pop_front();

        group & g = groups[r.group];
        if (!g.dirty && g.slot_of[r.expert] == -1) {
            const auto slot = std::find(g.expert_of.begin(), g.expert_of.end(), -1);
            if (slot != g.expert_of.end()) {
                place(g, slot - g.expert_of.begin(), r.expert);
            }
        }
        r.slot = g.slot_of[r.expert];
        if (g.dirty || r.slot == -1) {
            continue;
        }
        slice & s = g.tensors[r.tensor].slices[r.slot];
        if (s.state == SLICE_EMPTY) {
            s.state = SLICE_LOADING;
            g.n_ahead++;
            n_reading_ahead++;
            n_reading_load++;
            return true;
        }
    }
    if (had_loads && n_reading_load == 0) {
        cv_ready.notify_all();
    }
    return false;
}

void llama_expert_cache::wait_loaded() {
    std::unique_lock<std::mutex> lock(mutex);

    cv_ready.wait(lock, [this] { return loads.empty() && n_reading_load == 0; });
}

size_t llama_expert_cache::bytes_loaded() const {
    std::lock_guard<std::mutex> lock(mutex);

    return n_bytes_loaded;
}

bool llama_expert_cache::used() const {
    std::lock_guard<std::mutex> lock(mutex);

    return called;
}

std::vector<std::vector<int>> llama_expert_cache::hot() {
    std::unique_lock<std::mutex> lock(mutex);

    std::vector<std::vector<int>> res(groups.size());
    for (size_t ig = 0; ig < groups.size(); ig++) {
        group & g = groups[ig];
        if (g.dirty) {
            cv_ready.wait(lock, [&g] { return g.n_loading == 0 && g.n_ahead == 0; });
            settle(g);
        }
        std::copy_if(g.expert_of.begin(), g.expert_of.end(), std::back_inserter(res[ig]), [](int e) { return e != -1; });
        std::sort(res[ig].begin(), res[ig].end(), [&g](int a, int b) { return g.ranking->less_valuable(b, a); });
    }
    for (const auto & r : loads) {
        auto & experts = res[r.group];
        if (experts.size() < groups[r.group].expert_of.size() && std::find(experts.begin(), experts.end(), r.expert) == experts.end()) {
            experts.push_back(r.expert);
        }
    }
    return res;
}

std::string llama_expert_cache::read(const request & r, int ir, int & n_wrong) const {
    const tensor & t    = groups[r.group].tensors[r.tensor];
    const size_t   offs = t.desc.offs + r.expert * t.desc.size;
    uint8_t *      slot = t.arena + r.slot * t.stride;
    uint8_t *      raw  = t.desc.transform ? staging + ir * n_staging : slot;

    std::string err = files.read(t.desc.file, offs, t.desc.size, raw);
    if (checksums) {
        const uint64_t expected = checksums->at(r.group, r.tensor, r.expert);
        while (err.empty() && llama_expert_checksum(raw + offs % LLAMA_EXPERT_IO_ALIGN, t.desc.size) != expected) {
            err = ++n_wrong < 2 ? files.read(t.desc.file, offs, t.desc.size, raw) : "the bytes are not those that were there when the model was loaded, twice";
        }
    }
    if (!t.desc.transform) {
        if (t.desc.pad > 0) {
            memset(slot + offs % LLAMA_EXPERT_IO_ALIGN + t.desc.size, 0, t.desc.pad); // direct reads fill whole pages
        }
        return err;
    }
    if (err.empty() && memory != nullptr) {
        return memory->write(slot, raw + offs % LLAMA_EXPERT_IO_ALIGN, t.desc.size);
    }
    if (err.empty()) {
        transform(r.group, r.tensor, raw + offs % LLAMA_EXPERT_IO_ALIGN, slot);
    }
    return err;
}

std::string llama_expert_read_error(const llama_expert_files & files, const llama_expert_tensor_desc & desc, int expert, const std::string & reason) {
    return files.name(desc.file) + ": cannot read tensor " + desc.name + ", expert " + std::to_string(expert) +
        ", offset " + std::to_string(desc.offs + expert * desc.size) + ", " + std::to_string(desc.size) + " bytes: " + reason;
}

void llama_expert_cache::reader_main(int ir) {
    std::unique_lock<std::mutex> lock(mutex);

    while (true) {
        request r;
        cv_work.wait(lock, [&] { return stop || take(r); });
        if (stop) {
            return;
        }

        lock.unlock();
        const uint64_t    t_start = now_ns();
        int               n_wrong = 0;
        const std::string err     = read(r, ir, n_wrong);
        const uint64_t    t_read  = now_ns() - t_start;
        lock.lock();

        group &  g = groups[r.group];
        tensor & t = g.tensors[r.tensor];
        slice &  s = t.slices[r.slot];

        // of the current call of its layer
        const bool needed = g.slot[r.expert] == r.slot;
        const bool in_op  = needed && r.group == op_group && r.tensor == op_tensor;

        (r.ahead ? g.n_ahead : g.n_loading)--;
        n_reading_ahead -= r.ahead;
        g.counters.reads_wrong += counting ? n_wrong : 0;
        n_reading_load -= r.load;

        if (err.empty()) {
            s.state = SLICE_READY;
            if (r.load) {
                n_bytes_loaded += t.desc.size;
            } else if (counting) {
                g.counters.reads++;
                (r.ahead ? g.counters.bytes_ahead : g.counters.bytes_demand) += t.desc.size;
                g.counters.read_ns += t_read;
            }
            if (in_op) {
                const size_t n_ready = op_ready.load();
                op_order[n_ready]    = r.expert;
                op_ready.store(n_ready + 1, std::memory_order_release);
            }
        } else if (r.ahead) {
            // nobody has asked for it yet: if somebody does, the read is made again and may fail for him
            s.state = SLICE_EMPTY;
            s.ahead = false;
            if (needed) {
                enqueue(r.group, r.tensor, r.slot, r.expert);
            }
        } else {
            s.state = SLICE_FAILED;
            g.dirty = true;
            error   = llama_expert_read_error(files, t.desc, r.expert, err);
            if (in_op) {
                op_failed.store(true);
            }
        }

        if (in_op || g.n_loading == 0 || g.n_ahead == 0 || (r.load && loads.empty())) {
            cv_ready.notify_all();
        }
    }
}

//
// counters, errors
//

llama_expert_counters llama_expert_cache::counters(int il) const {
    std::lock_guard<std::mutex> lock(mutex);

    llama_expert_counters res;
    for (int i = 0; i < (int) groups.size(); i++) {
        if (il >= 0 && il != i) {
            continue;
        }
        const auto & c = groups[i].counters;
        res.calls += c.calls;
        res.calls_streamed += c.calls_streamed;
        res.hits += c.hits;
        res.misses += c.misses;
        res.evictions += c.evictions;
        res.hits_ahead += c.hits_ahead;
        res.bytes_demand += c.bytes_demand;
        res.bytes_ahead += c.bytes_ahead;
        res.bytes_used += c.bytes_used;
        res.reads += c.reads;
        res.stall_ns += c.stall_ns;
        res.read_ns += c.read_ns;
        res.reads_wrong += c.reads_wrong;
        res.ids_ns += c.ids_ns;
        res.remap_ns += c.remap_ns;
        res.forecasts += c.forecasts;
        res.forecasts_read += c.forecasts_read;
        res.forecast_experts += c.forecast_experts;
        res.forecast_used += c.forecast_used;
        res.forecast_needed += c.forecast_needed;
        res.forecast_ns += c.forecast_ns;
    }
    return res;
}

void llama_expert_cache::reset_counters() {
    std::lock_guard<std::mutex> lock(mutex);

    for (auto & g : groups) {
        g.counters = {};
    }
}

void llama_expert_cache::count_device(int ig, uint64_t ids_ns, uint64_t remap_ns) {
    std::lock_guard<std::mutex> lock(mutex);

    if (counting) {
        groups[ig].counters.ids_ns += ids_ns;
        groups[ig].counters.remap_ns += remap_ns;
    }
}

const void * llama_expert_cache::slots(int ig, int it, size_t * stride) const {
    const tensor & t = groups[ig].tensors[it];

    *stride = t.stride;

    return data(t, 0, 0);
}

void llama_expert_cache::set_error(const std::string & text) {
    std::lock_guard<std::mutex> lock(mutex);

    error = text;
}

const char * llama_expert_cache::last_error() const {
    // of the thread: another context on the model may fail, and ask, at the same time
    static thread_local std::string res;

    std::lock_guard<std::mutex> lock(mutex);

    res = error;

    return res.c_str();
}

bool llama_expert_cache::flip_byte(int il) {
    std::unique_lock<std::mutex> lock(mutex);

    group & g   = groups[il];
    ahead.group = -1;
    cv_ready.wait(lock, [&g] { return g.n_loading == 0 && g.n_ahead == 0; });
    settle(g);

    int best = -1;
    for (const int expert : g.expert_of) {
        if (expert != -1 && (best == -1 || g.ranking->less_valuable(best, expert))) {
            best = expert;
        }
    }
    if (best == -1) {
        return false;
    }
    const tensor & t = g.tensors[0];
    if (memory != nullptr && t.desc.transform) {
        return false; // the host may not be able to write there
    }
    data(t, g.slot_of[best], best)[t.desc.size / 2 + 3] ^= 0xff;

    return true;
}
