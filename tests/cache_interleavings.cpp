// All interleavings of the expert cache's threads, on the class itself: llama-expert-cache.cpp is compiled with stand-ins
// for std::mutex, std::condition_variable and std::thread that give every decision to an explorer.
//
// What is explored: which thread goes on at every lock, wait, read and use of an expert; whether a read fails (a bounded
// number of times); whether a graph is cut off after an op (bounded, too). Threads are coroutines, runs are repeated with
// every choice (depth first), and a state that was seen before is not gone into again. State is: the cache's fields, the
// order of the policy, what every coroutine is doing, the choices left.
//
// What is not: storage (reads fill memory), the hardware's memory model and access to atomics outside of the mutex (the
// sanitizers look at those), more threads, experts and calls than the few of each scenario, spurious wake-ups (which
// could only hide a lost one), and, once the cache is being destroyed, orders other than one.
//
// Properties: a READY slice has the bytes of its expert, always; what next() gives out has them, and still has after
// other threads went on (use before ready, refill in use); one reader writes a slot at a time; expert and slot map to
// each other, one to one; a call's experts keep their slots (double eviction); reads in flight are counted rightly;
// nobody waits for ever (lost wake-up); an op fails only if a read failed since its call began, so that what follows a failure works.
//
// Prints states and runs per scenario; on a violation says which and exits with 1. LIBRARY names the .cpp, so that
// mutations of it can be explored (test_cache_interleavings.py).

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <ucontext.h>
#include <unordered_set>
#include <vector>

//
// the explorer
//

struct pruned {};

static constexpr size_t STACK = 128 * 1024;

struct coroutine {
    ucontext_t            context;
    std::function<void()> body;
    std::function<bool()> can_run; // empty: it can
    const void *          waits  = nullptr; // condition variable
    bool                  done   = false;
    bool                  reader = false;
    std::vector<int>      doing; // where it is, for the state,
    int                   step = 0; // and how many times it has let others go on since it got there

    void at(std::vector<int> place) {
        doing = std::move(place);
        step  = 0;
    }
};

static struct {
    ucontext_t                              context;
    std::vector<std::unique_ptr<coroutine>> coroutines;
    std::vector<std::unique_ptr<char[]>>    stacks; // of the coroutines, kept for the next run
    coroutine *                             current = nullptr;

    std::vector<std::pair<int, int>> path; // chosen, of
    size_t                           depth     = 0;
    bool                             unwinding = false; // a run that is given up
    bool                             teardown  = false; // choices are not explored any more

    std::unordered_set<uint64_t> seen;
    std::function<uint64_t()>    state;
    std::function<void()>        check;
} E;

[[noreturn]] static void violation(const std::string & what) {
    printf("VIOLATION: %s\n", what.c_str());
    fflush(stdout);
    _Exit(1);
}

#define REQUIRE(x)         \
    do {                   \
        if (!(x)) {        \
            violation(#x); \
        }                  \
    } while (0)

static int choose(int n) {
    if (n == 1 || E.teardown || E.unwinding) {
        return 0;
    }
    if (E.depth == E.path.size()) {
        E.path.push_back({ 0, n });
    }
    REQUIRE(E.path[E.depth].second == n); // runs can be repeated
    return E.path[E.depth++].first;
}

// let others go on; until can_run is true if it is given
static void yield(std::function<bool()> can_run = nullptr) {
    if (E.unwinding) {
        return; // locks in destructors
    }
    E.current->can_run = std::move(can_run);
    E.current->step++;
    swapcontext(&E.current->context, &E.context);
    if (E.unwinding) {
        throw pruned();
    }
}

static void enter() {
    coroutine * c = E.current;
    try {
        if (!E.unwinding) {
            c->body();
        }
    } catch (const pruned &) {
    }
    c->body = nullptr;
    c->done = true;
    swapcontext(&c->context, &E.context);
}

static coroutine * spawn(std::function<void()> body) {
    E.coroutines.push_back(std::make_unique<coroutine>());
    coroutine * c = E.coroutines.back().get();
    c->body       = std::move(body);
    if (E.stacks.size() < E.coroutines.size()) {
        E.stacks.emplace_back(new char[STACK]);
    }
    getcontext(&c->context);
    c->context.uc_stack.ss_sp   = E.stacks[E.coroutines.size() - 1].get();
    c->context.uc_stack.ss_size = STACK;
    c->context.uc_link          = nullptr;
    makecontext(&c->context, enter, 0);
    return c;
}

static void resume(coroutine * c) {
    E.current = c;
    swapcontext(&E.context, &c->context);
    E.current = nullptr;
}

// one run along the path; the first coroutine is unwound last, it owns what the others use
static void run(std::function<void()> body) {
    E.coroutines.clear();
    E.depth     = 0;
    E.unwinding = E.teardown = false;
    spawn(std::move(body));
    while (true) {
        std::vector<coroutine *> ready;
        bool                     all_done = true;
        for (auto & c : E.coroutines) {
            all_done = all_done && c->done;
            if (!c->done && c->waits == nullptr && (!c->can_run || c->can_run())) {
                ready.push_back(c.get());
            }
        }
        if (all_done) {
            return;
        }
        if (ready.empty()) {
            violation("nobody can go on: a wake-up was lost");
        }
        if (!E.teardown) {
            E.check();
            if (E.depth == E.path.size() && ready.size() > 1 && !E.seen.insert(E.state()).second) {
                break;
            }
        }
        resume(ready[choose(ready.size())]);
    }
    E.unwinding = true;
    for (size_t i = E.coroutines.size(); i-- > 0;) {
        if (!E.coroutines[i]->done) {
            resume(E.coroutines[i].get());
        }
    }
}

static void explore(const std::string & name, const std::function<void()> & body) {
    E.seen.clear();
    E.path.clear();
    size_t n_runs = 0;
    while (true) {
        run(body);
        n_runs++;
        if (getenv("VERBOSE") && n_runs % 10000 == 0) {
            printf("%zu runs, %zu states, depth %zu\n", n_runs, E.seen.size(), E.path.size());
        }
        while (!E.path.empty() && E.path.back().first + 1 == E.path.back().second) {
            E.path.pop_back();
        }
        if (E.path.empty()) {
            break;
        }
        E.path.back().first++;
    }
    printf("%s: %zu states, %zu runs\n", name.c_str(), E.seen.size(), n_runs);
}

//
// what the cache is compiled with
//

namespace std {
struct explored_mutex {
    bool locked = false;

    void lock() {
        if (E.unwinding) {
            return;
        }
        yield([this] { return !locked; });
        locked = true;
    }

    void unlock() { locked = false; }
};

struct explored_condition {
    template <typename P>
    void wait(unique_lock<explored_mutex> & lock, P pred) {
        while (!pred()) {
            explored_mutex * mutex = lock.mutex();
            mutex->locked          = false;
            E.current->waits       = this;
            E.current->step        = -2; // wherever it came from, it looks again at what it waits for
            if (E.current->reader) {
                E.current->doing.clear();
            }
            yield([mutex] { return !mutex->locked; });
            mutex->locked = true;
        }
    }

    void notify_all() {
        for (auto & c : E.coroutines) {
            if (c->waits == this) {
                c->waits = nullptr;
            }
        }
    }
};

struct explored_thread {
    coroutine * c;

    template <typename F>
    explicit explored_thread(F f) : c(spawn(f)) { c->reader = true; }

    void join() {
        if (!E.unwinding) {
            yield([this] { return c->done; });
        }
    }
};
} // namespace std

#define mutex              explored_mutex
#define condition_variable explored_condition
#define thread             explored_thread
#define madvise(...)       0 // pages at the first use: there are many runs
#include LIBRARY
#undef mutex
#undef condition_variable
#undef thread
#undef madvise

//
// storage
//

static constexpr int    N_TENSORS = 2;
static constexpr size_t SIZE      = 8;

static int                         failures_left;
static int                         cuts_left;
static bool                        failed;
static std::multiset<const void *> in_use;
static std::set<const void *>      written;

static uint8_t pattern(size_t offs) {
    return (uint8_t) (1 + offs / SIZE);
}

static bool holds(const uint8_t * data, size_t offs) {
    return std::all_of(data, data + SIZE, [&](uint8_t x) { return x == pattern(offs); });
}

llama_expert_files::llama_expert_files(llama_expert_io_mode mode, llama_expert_pread) : io_mode(mode) {
    files.emplace_back();
    files[0].name = "file";
    files[0].size = 1 << 20;
}

llama_expert_files::llama_expert_files(const std::vector<int> &, llama_expert_io_mode mode, llama_expert_pread) : llama_expert_files(mode, nullptr) {}
llama_expert_files::~llama_expert_files() = default;

size_t llama_expert_files::extent(size_t, size_t) {
    return 2 * LLAMA_EXPERT_IO_ALIGN;
}

std::string llama_expert_files::read(int, size_t offs, size_t size, uint8_t * dst) const {
    uint8_t * p = dst + offs % LLAMA_EXPERT_IO_ALIGN;
    REQUIRE(in_use.count(dst) == 0); // nobody computes with what is overwritten
    REQUIRE(written.insert(dst).second); // one reader at a time
    memset(p, 0xee, size);
    E.current->at({ (int) offs, 1 });
    yield();
    const bool fails = failures_left > 0 && choose(2) == 1;
    if (fails) {
        failures_left--;
        failed = true;
    } else {
        memset(p, pattern(offs), size);
    }
    REQUIRE(in_use.count(dst) == 0);
    written.erase(dst);
    E.current->at({ (int) offs, 2 + fails });

    return fails ? "failed" : "";
}

//
// scenarios
//

struct graph {
    int                  group;
    std::vector<int32_t> ids;
    int                  n_ids; // of a token
    std::vector<int>     ahead; // read ahead of it
};

struct scenario {
    const char *                    name;
    int                             n_groups, n_expert, n_slots, n_readers, n_threads, n_failures, n_cuts;
    std::vector<std::vector<graph>> contexts;
    bool                            judged = false; // names are judged, by a judge that is about to change its mind
};

// sees what is private
struct llama_expert_cache_explorer {
    typedef llama_expert_cache cache_type;

    llama_expert_cache * cache = nullptr;

    static const uint8_t * slot_of(const cache_type::tensor & t, const void * data) {
        return t.arena + ((const uint8_t *) data - t.arena) / t.stride * t.stride;
    }

    void check() const {
        if (!cache || cache->explored_mutex.locked || cache->n_slots() == 0) {
            return;
        }
        for (const auto & g : cache->groups) {
            int n_loading = 0, n_ahead = 0;
            for (const auto & t : g.tensors) {
                for (size_t slot = 0; slot < t.slices.size(); slot++) {
                    const auto & s = t.slices[slot];
                    if (s.state == cache_type::SLICE_READY) {
                        REQUIRE(holds(cache->data(t, slot, s.expert), t.desc.offs + s.expert * SIZE)); // READY has the bytes
                    }
                    n_loading += s.state == cache_type::SLICE_LOADING && !s.ahead;
                    n_ahead += s.state == cache_type::SLICE_LOADING && s.ahead;
                }
            }
            REQUIRE(n_loading == g.n_loading);
            REQUIRE(n_ahead == g.n_ahead);
            if (g.dirty) {
                continue;
            }
            for (int slot = 0; slot < (int) g.expert_of.size(); slot++) {
                const int expert = g.expert_of[slot];
                REQUIRE(expert == -1 || g.slot_of[expert] == slot); // one to one
            }
            for (const int expert : g.needed) {
                REQUIRE(g.slot[expert] != -1 && g.expert_of[g.slot[expert]] == expert); // a call's experts keep their slots
            }
        }
    }

    uint64_t state() const {
        uint64_t   h   = 0xcbf29ce484222325ull;
        const auto add = [&h](uint64_t x) { h = (h ^ (x + 0x9e3779b97f4a7c15ull)) * 0x100000001b3ull; h ^= h >> 29; };
        const auto all = [&](const auto & v) { add(v.size()); for (const auto x : v) { add(x); } };
        add(failures_left), add(cuts_left), add(failed), add(in_use.size());
        for (const auto & c : E.coroutines) {
            add(c->done), add(!c->can_run || c->can_run()), add(c->step), all(c->doing);
            add(!cache ? 0 : c->waits == nullptr  ? 1
                    : c->waits == &cache->cv_work ? 2
                                                  : 3);
        }
        if (!cache) {
            return h;
        }
        add(cache->explored_mutex.locked), add(cache->turn_mutex.locked), add(cache->queue.size());
        for (const auto & r : cache->queue) {
            add(r.group), add(r.tensor), add(r.slot), add(r.expert), add(r.ahead);
        }
        add(cache->ahead.group), add(cache->ahead.pos), all(cache->ahead.experts), all(cache->ahead.expected);
        add(cache->n_reading_ahead), add(cache->stop), add(cache->op_group), add(cache->op_tensor), add(cache->op_streamed);
        all(cache->op_order), add(cache->op_ready), add(cache->op_failed);
        for (const auto & c : cache->op_cursors) {
            add(c.pos);
        }
        for (const auto & g : cache->groups) {
            all(g.order), all(g.slot_of), all(g.expert_of), all(g.ahead), all(g.names), all(g.absent), all(g.needed), all(g.slot), all(g.misses), all(g.ring);
            add(g.named), add(g.judge.precision * 1e6), add(g.judge.n_judged), add(g.judge.n_skipped), add(g.judge.pays);
            add(g.n_loading), add(g.n_ahead), add(g.dirty), add(g.n_ops), add(g.tensors_done), add(g.streamed);
            for (const auto & t : g.tensors) {
                add(t.n_issued);
                for (const auto & s : t.slices) {
                    add(s.expert), add(s.state), add(s.ahead), add(s.busy), add(s.n_left);
                }
            }
            for (int a = 0; g.ranking && a < g.desc.n_expert; a++) {
                for (int b = 0; b < a; b++) {
                    add(g.ranking->less_valuable(a, b));
                }
            }
        }
        return h;
    }

    // one thread's part of an op
    int use(const graph & call, int it, int ith, const std::vector<int> & doing) const {
        const auto &  t = cache->groups[call.group].tensors[it];
        std::set<int> got;
        while (true) {
            E.current->at(doing);
            E.current->doing.push_back(-1);
            yield();
            const void * data   = nullptr;
            const int    expert = cache->next(ith, &data);
            if (expert < 0) {
                REQUIRE(expert != -2 || failed);
                REQUIRE(expert == -2 || got == std::set<int>(call.ids.begin(), call.ids.end()));
                return expert;
            }
            REQUIRE(got.insert(expert).second);
            const uint8_t * slot = slot_of(t, data);
            REQUIRE(holds((const uint8_t *) data, t.desc.offs + expert * SIZE)); // not before it is ready
            E.current->at(doing);
            E.current->doing.push_back(expert);
            in_use.insert(slot);
            yield();
            in_use.erase(in_use.find(slot));
            REQUIRE(holds((const uint8_t *) data, t.desc.offs + expert * SIZE)); // not refilled meanwhile
        }
    }

    void context(const scenario & s, int ic, coroutine *) const {
        for (int i = 0; i < (int) s.contexts[ic].size(); i++) {
            const graph & call = s.contexts[ic][i];

            std::unique_lock<std::explored_mutex> turn(cache->turn());
            failed = false; // of an earlier call
            if (!call.ahead.empty()) {
                E.current->at({ ic, i, -2 });
                if (!s.judged || cache->wants_ahead(call.group)) {
                    cache->read_ahead(call.group, call.ahead);
                }
            }
            for (int it = 0; it < N_TENSORS; it++) {
                E.current->at({ ic, i, it, -3 });
                cache->begin(call.group, it, (const char *) call.ids.data(), call.n_ids, call.ids.size() / call.n_ids, sizeof(int32_t), call.n_ids * sizeof(int32_t), s.n_threads);

                coroutine * other  = nullptr;
                int         result = -1;
                if (s.n_threads == 2) {
                    other = spawn([&] { result = use(call, it, 1, { ic, i, it, 1 }); });
                }
                const int mine = use(call, it, 0, { ic, i, it, 0 });
                E.current->at({ ic, i, it, -4, mine });
                if (other) {
                    yield([other] { return other->done; });
                    REQUIRE(result == mine);
                }
                if (mine == -2) {
                    REQUIRE(strstr(cache->last_error(), "cannot read tensor t") != nullptr);
                    break;
                }
                if (cuts_left > 0 && choose(2) == 1) {
                    cuts_left--;
                    break;
                }
            }
        }
        E.current->at({ ic, -1 });
    }

    void run(const scenario & s) {
        in_use.clear();
        written.clear();
        failures_left = s.n_failures;
        cuts_left     = s.n_cuts;
        failed        = false;
        cache         = nullptr;

        std::vector<llama_expert_group_desc> groups;
        for (int ig = 0; ig < s.n_groups; ig++) {
            llama_expert_group_desc g;
            g.n_expert      = s.n_expert;
            g.n_expert_used = s.contexts[0][0].n_ids;
            for (int it = 0; it < N_TENSORS; it++) {
                g.tensors.push_back({ "t" + std::to_string(ig) + std::to_string(it), 0, (ig * N_TENSORS + it) * s.n_expert * SIZE, SIZE, false });
            }
            groups.push_back(g);
        }
        const llama_expert_files files({}, LLAMA_EXPERT_IO_DIRECT);
        llama_expert_cache       c(files, groups, LLAMA_EXPERT_POLICY_LRU, s.n_readers);
        c.allocate(s.n_slots);
        if (s.judged) {
            c.judging = true;
            for (auto & g : c.groups) {
                g.judge = { 0.59f, llama_expert_judge::N_LEAST, llama_expert_judge::EVERY - 1, false };
            }
        }
        cache = &c;

        struct forget {
            llama_expert_cache *& cache;

            ~forget() { cache = nullptr; }
        } forget{ cache };

        std::vector<coroutine *> others;
        for (size_t ic = 1; ic < s.contexts.size(); ic++) {
            others.push_back(spawn([this, &s, ic] { context(s, ic, nullptr); }));
        }
        context(s, 0, nullptr);
        for (coroutine * other : others) {
            yield([other] { return other->done; });
        }
        E.teardown = true; // unloaded with reads under way
    }
};

int main() {
    const scenario scenarios[] = {
        { "decode, 2 threads",          1, 3, 2, 2, 2, 0, 0, { { { 0, { 0, 1 }, 2, {} }, { 0, { 2, 1 }, 2, {} } } }                            },
        { "failures and cuts",          1, 3, 2, 2, 1, 1, 1, { { { 0, { 0, 1 }, 2, {} }, { 0, { 2, 0 }, 2, {} }, { 0, { 0, 1 }, 2, {} } } }    },
        { "streams, 2 threads",         1, 3, 2, 1, 2, 0, 0, { { { 0, { 0, 1, 2 }, 1, {} }, { 0, { 1 }, 1, {} } } }                            },
        { "streams, failures and cuts", 1, 3, 2, 2, 1, 1, 1, { { { 0, { 0, 1, 2 }, 1, {} }, { 0, { 1 }, 1, {} }, { 0, { 2, 1, 0 }, 1, {} } } } },
        { "reading ahead",              1, 3, 2, 2, 1, 1, 0, { { { 0, { 0 }, 1, { 1 } }, { 0, { 1 }, 1, { 2 } }, { 0, { 0, 1, 2 }, 1, {} } } } },
        { "reading ahead, judged",      1, 4, 2, 2, 1, 1, 0, { { { 0, { 0 }, 1, { 0 } }, { 0, { 1 }, 1, { 2 } }, { 0, { 1 }, 1, { 3 } }, { 0, { 0 }, 1, { 0 } } } }, true },
        { "two contexts",               2, 3, 2, 2, 1, 0, 0, { { { 0, { 0 }, 1, {} }, { 1, { 1 }, 1, {} } }, { { 0, { 2 }, 1, { 1 } } } }      },
    };
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
    for (const scenario & s : scenarios) {
        llama_expert_cache_explorer explorer;
        E.state = [&] { return explorer.state(); };
        E.check = [&] { explorer.check(); };
        explore(s.name, [&] { explorer.run(s); });
    }
    printf("OK\n");

    return 0;
}
