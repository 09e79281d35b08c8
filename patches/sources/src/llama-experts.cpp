#include "llama-experts.h"

#include "llama-expert-cache.h"
#include "llama-expert-probe.h"
#include "llama-expert.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

static constexpr double MiB = 1024.0 * 1024.0;

//
// configuration
//

static std::string override_str(const llama_model_kv_override & kv) {
    if (kv.tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
        throw std::runtime_error(format("%s must be a string", kv.key));
    }
    return std::string(kv.val_str, strnlen(kv.val_str, sizeof(kv.val_str)));
}

llama_expert_config llama_expert_config::from_overrides(const std::unordered_map<std::string, llama_model_kv_override> & overrides) {
    llama_expert_config res;

    for (const auto & [key, kv] : overrides) {
        if (key.rfind("expert_cache.", 0) != 0) {
            continue;
        }
        if (key == "expert_cache.budget") {
            res.budget = override_str(kv);
        } else if (key == "expert_cache.policy") {
            const std::string value = override_str(kv);
            if (!llama_expert_policy_from_name(value.c_str(), res.policy)) {
                throw std::runtime_error("unknown expert cache policy '" + value + "', use next-use, lfu or lru");
            }
        } else if (key == "expert_cache.io") {
            const std::string value = override_str(kv);
            if (value != "auto" && value != "direct" && value != "mmap") {
                throw std::runtime_error("unknown expert cache read mode '" + value + "', use auto, direct or mmap");
            }
            res.io = value == "auto" ? LLAMA_EXPERT_IO_AUTO : value == "direct" ? LLAMA_EXPERT_IO_DIRECT
                                                                                : LLAMA_EXPERT_IO_MMAP;
        } else if (key == "expert_cache.threads") {
            const bool automatic = kv.tag == LLAMA_KV_OVERRIDE_TYPE_STR && override_str(kv) == "auto";
            if (!automatic && (kv.tag != LLAMA_KV_OVERRIDE_TYPE_INT || kv.val_i64 < 1 || kv.val_i64 > 64)) {
                throw std::runtime_error("expert_cache.threads must be auto or an integer from 1 to 64");
            }
            res.n_threads = automatic ? 0 : kv.val_i64;
        } else if (key == "expert_cache.repack") {
            const std::string value = override_str(kv);
            if (value != "auto" && value != "on" && value != "off") {
                throw std::runtime_error("unknown value '" + value + "' for repacking experts, use auto, on or off");
            }
            res.repack = value == "auto" ? REPACK_AUTO : value == "on" ? REPACK_ON
                                                                       : REPACK_OFF;
        } else if (key == "expert_cache.prefetch") {
            const std::string value = override_str(kv);
            if (value != "off" && value != "router" && value != "auto") {
                throw std::runtime_error("unknown expert prefetch '" + value + "', use auto, router or off");
            }
            res.prefetch = value == "auto" ? PREFETCH_AUTO : value == "router" ? PREFETCH_ROUTER
                                                                               : PREFETCH_OFF;
        } else if (key == "expert_cache.verify") {
            const std::string value = override_str(kv);
            if (value != "off" && value != "on") {
                throw std::runtime_error("unknown value '" + value + "' for verifying experts, use on or off");
            }
            res.verify = value == "on";
        } else if (key == "expert_cache.warm") {
            res.warm = override_str(kv);
        } else if (key == "expert_cache.route_bias") {
            if (kv.tag != LLAMA_KV_OVERRIDE_TYPE_FLOAT || !(kv.val_f64 > 0.0) || kv.val_f64 > 4.0) {
                throw std::runtime_error("expert_cache.route_bias must be a number above 0, at most 4; without it routing is the model's own");
            }
            res.route_bias = kv.val_f64;
        } else if (key == "expert_cache.route_keep") {
            if (kv.tag != LLAMA_KV_OVERRIDE_TYPE_INT || kv.val_i64 < 0 || kv.val_i64 > 1024) {
                throw std::runtime_error("expert_cache.route_keep must be an integer from 0 to the number of experts that a token uses, less 1");
            }
            res.route_keep = kv.val_i64;
        } else {
            throw std::runtime_error("unknown key " + key);
        }
    }
    if (res.route_bias > 0.0 && !res.enabled()) {
        throw std::runtime_error("a route bias prefers experts in the cache, and there is no expert cache: use it with --expert-cache");
    }
    if (res.route_bias > 0.0 && res.prefetch != PREFETCH_OFF) {
        throw std::runtime_error("with a route bias what is read ahead would change the output, by how fast it is read: use it without --expert-prefetch");
    }
    if (res.route_bias == 0.0 && overrides.count("expert_cache.route_keep") > 0) {
        throw std::runtime_error("expert_cache.route_keep has no effect without expert_cache.route_bias");
    }
    return res;
}

// "16s" -> 16 slots per layer; "880MiB", "1.5G", "922746880" -> bytes (K, M, G are powers of 1024, KB, MB, GB of 1000)
struct budget_spec {
    int    n_slots = 0;
    size_t bytes   = 0;
};

static budget_spec parse_budget(const std::string & text) {
    const auto bad = [&]() {
        return std::runtime_error("expert cache budget '" + text + "' is not a size: use bytes as in 880MiB or 1.5G, slots per layer as in 16s, auto or off");
    };
    size_t pos   = 0;
    double value = 0;
    try {
        value = std::stod(text, &pos);
    } catch (const std::exception &) {
        throw bad();
    }
    if (!(value > 0) || value > 1e15) {
        throw bad();
    }
    const std::string unit = text.substr(pos);
    if (unit == "s") {
        if (value != std::floor(value) || value > 1e6) {
            throw bad();
        }
        return { (int) value, 0 };
    }
    static const std::map<std::string, double> units = {
        { "",    1                    },
        { "B",   1                    },
        { "K",   1024                 },
        { "KiB", 1024                 },
        { "KB",  1e3                  },
        { "M",   1024 * 1024          },
        { "MiB", 1024 * 1024          },
        { "MB",  1e6                  },
        { "G",   1024.0 * 1024 * 1024 },
        { "GiB", 1024.0 * 1024 * 1024 },
        { "GB",  1e9                  },
    };
    const auto it = units.find(unit);
    if (it == units.end()) {
        throw bad();
    }
    return { 0, (size_t) (value * it->second) };
}

//
// free memory for "auto"
//

static bool read_number(const std::string & path, uint64_t & value) {
    std::ifstream in(path);
    return bool(in >> value); // "max" in cgroup v2 is no number: no limit
}

static uint64_t read_stat(const std::string & path, const std::string & key) {
    std::ifstream in(path);
    std::string   name;
    uint64_t      value;
    while (in >> name >> value) {
        if (name == key) {
            return value;
        }
    }
    return 0;
}

// What this process may still take: the least of what the machine and the memory cgroups above us (v1 and v2) leave.
// Page cache can be dropped, so only anonymous and shared memory counts as taken.
static uint64_t memory_available() {
    uint64_t res = UINT64_MAX;
    {
        std::ifstream in("/proc/meminfo");
        std::string   name, unit;
        uint64_t      value;
        while (in >> name >> value) {
            if (name == "MemAvailable:") {
                res = value * 1024;
            }
            std::getline(in, unit);
        }
    }

    std::ifstream in("/proc/self/cgroup");
    std::string   line;
    while (std::getline(in, line)) {
        const size_t c1 = line.find(':');
        const size_t c2 = line.find(':', c1 + 1);
        if (c1 == std::string::npos || c2 == std::string::npos) {
            continue;
        }
        const std::string controllers = line.substr(c1 + 1, c2 - c1 - 1);
        const bool        v2          = controllers.empty();
        if (!v2 && controllers != "memory") {
            continue;
        }
        const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
        for (std::string dir = line.substr(c2 + 1);; dir = dir.substr(0, dir.rfind('/'))) {
            const std::string base  = root + (dir == "/" ? "" : dir) + "/";
            uint64_t          limit = 0;
            if (read_number(base + (v2 ? "memory.max" : "memory.limit_in_bytes"), limit)) {
                const uint64_t taken = v2
                    ? read_stat(base + "memory.stat", "anon") + read_stat(base + "memory.stat", "shmem")
                    : read_stat(base + "memory.stat", "total_rss") + read_stat(base + "memory.stat", "total_shmem");
                res                  = std::min(res, limit > taken ? limit - taken : 0);
            }
            if (dir.empty() || dir == "/") {
                break;
            }
        }
    }
    return res;
}

// room for what a process takes beside its buffers, and for the page cache of everyone else
static uint64_t reserve_of(uint64_t available) {
    return std::max<uint64_t>(available / 10, 128 * 1024 * 1024);
}

//
// loading
//

bool llama_experts::takes(const std::string & name) {
    static const char * suffixes[] = {
        ".ffn_up_exps.weight",
        ".ffn_gate_exps.weight",
        ".ffn_down_exps.weight",
        ".ffn_gate_up_exps.weight",
        ".ffn_up_chexps.weight",
        ".ffn_gate_chexps.weight",
        ".ffn_down_chexps.weight",
    };
    for (const char * suffix : suffixes) {
        const size_t n = strlen(suffix);
        if (name.size() > n && name.compare(name.size() - n, n, suffix) == 0) {
            return true;
        }
    }
    return false;
}

static ggml_backend_reg_t cpu_reg() {
    auto * dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!dev) {
        throw std::runtime_error("no CPU backend found");
    }
    return ggml_backend_dev_backend_reg(dev);
}

void llama_experts::choose_device(const llama_model & model) {
    const int n_layer      = model.hparams.n_layer_all;
    const int n_gpu_layers = model.n_gpu_layers();
    if (model.devices.empty() || n_gpu_layers == 0) {
        return;
    }
    if (n_gpu_layers <= n_layer) {
        throw std::runtime_error(format("the expert cache computes the experts of all layers in one place, and %d of %d layers are for the GPU: use --n-gpu-layers 0 or all (and --fit off)", n_gpu_layers, n_layer + 1));
    }
    if (model.devices.size() > 1) {
        throw std::runtime_error(format("the expert cache works with one GPU, and %d were chosen: name one with --device", (int) model.devices.size()));
    }
    gpu = model.devices[0].dev;

    auto * fn = (const ggml_cuda_experts_i * (*)()) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(gpu), "ggml_backend_cuda_experts");
    cuda      = fn ? fn() : nullptr;
    if (!cuda) {
        throw std::runtime_error(format("the expert cache works on CPU and CUDA, not on %s: use --n-gpu-layers 0", ggml_backend_dev_name(gpu)));
    }
    if (model.arch == LLM_ARCH_MISTRAL4) {
        throw std::runtime_error("the experts of this model need a precision that CUDA does not have: use the expert cache with --n-gpu-layers 0");
    }
    if (config.prefetch == llama_expert_config::PREFETCH_AUTO) {
        config.prefetch = llama_expert_config::PREFETCH_OFF; // reading ahead needs the routers in the memory of the CPU
    }
    if (config.prefetch == llama_expert_config::PREFETCH_ROUTER) {
        throw std::runtime_error("expert prefetch needs the routers in the memory of the CPU: use --expert-prefetch with --n-gpu-layers 0");
    }
    if (config.repack == llama_expert_config::REPACK_ON) {
        throw std::runtime_error("experts are repacked for kernels of the CPU: use --expert-cache-repack on with --n-gpu-layers 0");
    }
}

ggml_backend_buffer_type_t llama_experts::buft() const {
    if (cuda) {
        return cuda->buffer_type(gpu);
    }
    auto * fn = (decltype(ggml_backend_cpu_expert_buffer_type) *) ggml_backend_reg_get_proc_address(cpu_reg(), "ggml_backend_cpu_expert_buffer_type");
    if (!fn) {
        throw std::runtime_error("the CPU backend has no expert buffers");
    }
    return fn();
}

llama_experts::llama_experts(const llama_expert_config & config) : config(config) {
    if (config.budget != "auto") {
        parse_budget(config.budget); // a typo is said before the model is read
    }
}

llama_experts::~llama_experts() {
    try {
        write_hot_set();
    } catch (const std::exception & e) {
        LLAMA_LOG_WARN("%s: expert cache: %s was not written: %s\n", __func__, config.warm.c_str(), e.what());
    }
    cache.reset();
#ifdef __linux__
    if (range != nullptr) {
        munmap(range, n_range);
    }
#endif
}

ggml_backend_buffer_t llama_experts::load(ggml_context * ctx, const llama_model_loader & ml, const llama_hparams & hparams, bool may_repack) {
    std::vector<int> fds;
    for (const auto & file : ml.files) {
        fds.push_back(file->file_id());
    }
    files = std::make_unique<llama_expert_files>(fds, config.io);
    if (cuda) {
        memory     = std::make_unique<llama_expert_cuda_memory>(*cuda, gpu, *files);
        may_repack = false;
    }

    // one group per block and kind of expert ("exps", "chexps"), tensors in the order in which the graph uses them
    static const char * order[] = { "ffn_up_", "ffn_gate_up_", "ffn_gate_", "ffn_down_" };

    std::map<std::pair<int, std::string>, std::vector<std::pair<int, ggml_tensor *>>> by_block;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        const std::string name = t->name;

        int il = -1;
        if (sscanf(name.c_str(), "blk.%d.", &il) != 1 || ggml_n_dims(t) > 3 || t->ne[2] < 1) {
            throw std::runtime_error("expert tensor " + name + " has an unexpected name or shape");
        }
        const std::string kind = name.find("_chexps") != std::string::npos ? "chexps" : "exps";
        for (int i = 0; i < 4; i++) {
            if (name.find("." + std::string(order[i]) + kind) != std::string::npos) {
                by_block[{ il, kind }].push_back({ i, t });
            }
        }
        n_range += GGML_PAD(ggml_nbytes(t), LLAMA_EXPERT_IO_ALIGN);
        n_expert_max = std::max(n_expert_max, (int) t->ne[2]);
    }

    // addresses for the tensors without memory behind them: whoever touches an expert past the cache is stopped at once
#ifdef __linux__
    range = mmap(nullptr, n_range, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {
        range = nullptr;
        throw std::runtime_error(format("cannot reserve %zu bytes of addresses for the experts", n_range));
    }
#endif

    // An expert that is read again and again is repacked again and again, which costs more than the kernels gain
    // (docs/performance.md): unless told otherwise only experts that are read once are repacked.
    const bool repack = may_repack && (config.repack == llama_expert_config::REPACK_ON || (config.repack == llama_expert_config::REPACK_AUTO && fits(n_range)));

    auto *                       buffer_fn = (decltype(ggml_backend_cpu_expert_buffer) *) ggml_backend_reg_get_proc_address(cpu_reg(), "ggml_backend_cpu_expert_buffer");
    const ggml_cpu_expert_source source    = { this, source_begin, source_next };
    const auto                   on_gpu    = cuda_source(this);
    ggml_backend_buffer_ptr      buf{ cuda ? cuda->buffer(gpu, range, n_range, &on_gpu) : buffer_fn(range, n_range, &source, repack) };
    auto *                       repack_fn = (decltype(ggml_backend_cpu_expert_repack) *) ggml_backend_reg_get_proc_address(cpu_reg(), "ggml_backend_cpu_expert_repack");

    std::vector<llama_expert_group_desc> groups;
    size_t                               n_used = 0;
    for (auto & [key, parts] : by_block) {
        std::sort(parts.begin(), parts.end());
        blocks.push_back(key.second == "exps" ? key.first : -1);
        tensors.emplace_back();

        llama_expert_group_desc desc;
        desc.n_expert      = parts[0].second->ne[2];
        desc.n_expert_used = hparams.n_expert_used(key.first);
        for (auto & [_, t] : parts) {
            if (t->ne[2] != desc.n_expert) {
                throw std::runtime_error(format("tensor %s has %d experts, others of its block have %d", t->name, (int) t->ne[2], desc.n_expert));
            }
            places[t] = { (int) groups.size(), (int) desc.tensors.size() };

            if (ggml_backend_tensor_alloc(buf.get(), t, (char *) range + n_used) != GGML_STATUS_SUCCESS) {
                throw std::runtime_error(format("cannot place tensor %s", t->name));
            }
            n_used += GGML_PAD(ggml_nbytes(t), LLAMA_EXPERT_IO_ALIGN);

            const auto & w = ml.require_weight(t->name);
            desc.tensors.push_back({ t->name, w.idx, w.offs, t->nb[2], repack_fn(t, nullptr, nullptr) });
            if (cuda) {
                check_gpu(t);
                auto & d    = desc.tensors.back();
                d.unit      = ggml_type_size(t->type);
                d.pad       = cuda->padding(t);
                d.transform = !memory->in_place() || d.size % LLAMA_EXPERT_IO_ALIGN != 0;
            }
            tensors.back().push_back(t);
        }
        groups.push_back(std::move(desc));
    }

    if (config.route_bias > 0.0) {
        find_choosers(hparams);
    }

    if (config.n_threads == 0) {
        config.n_threads = fits(n_range) ? llama_expert_config::N_THREADS : find_n_threads(groups);
    }

    cache = std::make_unique<llama_expert_cache>(*files, std::move(groups), config.policy, config.n_threads,
        [this, repack_fn](int group, int tensor, const uint8_t * src, uint8_t * dst) { repack_fn(tensors[group][tensor], src, dst); });

    if (config.verify) {
        verify();
    }
    if (!config.warm.empty()) {
        read_hot_set(ml);
    }

    if (config.budget != "auto") {
        const budget_spec spec = parse_budget(config.budget);

        budget = spec.n_slots > 0 ? cache->bytes_for(std::min(spec.n_slots, cache->n_slots_max())) : spec.bytes;
        if (budget < cache->bytes_floor()) {
            throw std::runtime_error(format(
                "the expert cache budget of %s (%.1f MiB) is below the floor of this model, %.1f MiB or %ds: %d of the %d experts of each of %d layers are used for every token",
                config.budget.c_str(), budget / MiB, std::ceil(cache->bytes_floor() / MiB * 10) / 10, cache->n_slots_min(), cache->n_slots_min(), cache->n_slots_max(), cache->n_groups()));
        }
        allocate(spec.n_slots > 0 ? std::min(spec.n_slots, cache->n_slots_max()) : cache->n_slots_for(budget));
    }
    return buf.release();
}

// whether the budget holds experts of so many bytes, as far as that can be said before there are contexts
bool llama_experts::fits(size_t n_bytes) const {
    n_bytes += n_bytes / 500 + 16 * 1024 * 1024; // metadata, staging
    if (config.budget == "auto") {
        const uint64_t available = memory_available();
        return available - std::min(available, reserve_of(available)) >= n_bytes;
    }
    const budget_spec spec = parse_budget(config.budget);

    return spec.n_slots > 0 ? spec.n_slots >= n_expert_max : spec.bytes >= n_bytes;
}

// how many readers the storage of the experts wants: as remembered, else found by reading; the default where that says nothing
int llama_experts::find_n_threads(const std::vector<llama_expert_group_desc> & groups) const {
    const int file = groups[0].tensors[0].file;
    if (files->in_memory(file)) {
        return llama_expert_config::N_THREADS;
    }
    llama_expert_readers found;
    size_t               size = 0, n_room = 0;
    for (const auto & g : groups) {
        for (const auto & t : g.tensors) {
            size = std::max(size, t.size);
            n_room += std::min(g.n_expert_used, g.n_expert) * t.size; // what the slots will take at least
        }
    }
    found.device = files->device(file);
    found.io     = llama_expert_io_mode_name(files->mode());
    for (found.size = 4096; found.size < size;) {
        found.size *= 2;
    }

    const std::string path    = llama_expert_readers_path();
    auto              entries = llama_expert_readers_read(path);
    for (const auto & e : entries) {
        if (e.device == found.device && e.io == found.io && e.size == found.size) {
            LLAMA_LOG_INFO("%s: expert cache: %d reader threads, as was found earlier on this device (%d MB/s; remove %s to look again)\n", __func__, e.n, e.mb_per_s, path.c_str());
            return e.n;
        }
    }

    const int64_t t_start = ggml_time_us();
    const auto    rates   = llama_expert_readers_measure(*files, groups, n_room);
    found.n               = llama_expert_readers_choose(rates);
    if (found.n == 0) {
        return llama_expert_config::N_THREADS;
    }
    std::string text;
    for (const auto & [n, rate] : rates) {
        text += format("%s%d: %.0f", text.empty() ? "" : ", ", n, rate / 1e6);
        found.mb_per_s = n == found.n ? std::min(rate / 1e6, 1e6) : found.mb_per_s;
    }
    LLAMA_LOG_INFO("%s: expert cache: %d reader threads, found in %.0f ms (threads: MB/s; %s)\n", __func__, found.n, (ggml_time_us() - t_start) / 1e3, text.c_str());

    entries.push_back(found);
    if (const std::string err = llama_expert_readers_write(path, entries); !err.empty()) {
        LLAMA_LOG_INFO("%s: expert cache: that is not remembered, %s: %s\n", __func__, path.c_str(), err.c_str());
    }
    return found.n;
}

// Checksums are taken when the slots are allocated: that reads the experts once, which can take a while.
void llama_experts::verify() {
    const int64_t t_start = ggml_time_us();

    cache->verify([this, t_start, t_last = t_start](double done) mutable {
        const int64_t t_now = ggml_time_us();
        if (t_now - t_last > 2000000) {
            t_last = t_now;
            LLAMA_LOG_INFO("%s: expert cache: checksums of %.0f of %.0f MiB, %.0f s left\n", __func__,
                done * cache->bytes_experts() / MiB, cache->bytes_experts() / MiB, (t_now - t_start) / 1e6 * (1 / done - 1));
        }
    });
}

// an op that the GPU refuses would go to the CPU, which has no experts then
void llama_experts::check_gpu(ggml_tensor * weight) const {
    ggml_context_ptr ctx{ ggml_init({ 3 * ggml_tensor_overhead(), nullptr, true }) };
    ggml_tensor *    b   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, weight->ne[0], 1, 1);
    ggml_tensor *    ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 1);
    if (!ggml_backend_dev_supports_op(gpu, ggml_mul_mat_id(ctx.get(), weight, b, ids))) {
        throw std::runtime_error(format("%s has no kernels for the experts in %s (%s): use the expert cache with --n-gpu-layers 0", ggml_backend_dev_name(gpu), weight->name, ggml_type_name(weight->type)));
    }
}

void llama_experts::allocate(int n_slots) {
    cache->allocate(n_slots, memory.get());

    LLAMA_LOG_INFO("%s: expert cache: %d slots of %d experts in each of %d layers, %.1f of %.1f MiB (budget %s, floor %.1f MiB, all experts %.1f MiB)\n", __func__,
        n_slots, cache->n_slots_max(), cache->n_groups(), cache->bytes_for(n_slots) / MiB, budget / MiB, config.budget.c_str(),
        cache->bytes_floor() / MiB, cache->bytes_experts() / MiB);
    LLAMA_LOG_INFO("%s: expert cache: policy %s, %s reads with %d threads, prefetch %s, %s kernels%s\n", __func__,
        llama_expert_policy_name(config.policy), llama_expert_io_mode_name(files->mode()), config.n_threads, prefetch_name(),
        kernels(), cache->verifies() ? ", reads verified" : "");
    if (memory) {
        LLAMA_LOG_INFO("%s: expert cache: slots in %s%s\n", __func__, memory->description(),
            memory->in_place() && cache->transforms() ? ", those of experts that are no multiple of 4 KiB through staging" : "");
    }
    if (!choosers.empty()) {
        LLAMA_LOG_WARN("%s: expert cache: ROUTE BIAS %g: tokens that come one at a time prefer experts in the cache, the router's first %d stay: the output is not the model's own\n", __func__,
            config.route_bias, config.route_keep);
    }
    load_experts();
}

//
// loading ahead of all calls
//

// what makes experts of the same name the same: their number and size, and the routers that choose them
static uint64_t identity(const llama_expert_files & files, const llama_model_loader & ml, const std::vector<std::vector<const ggml_tensor *>> & tensors) {
    static constexpr size_t N_ROUTER = 4096; // of its bytes

    std::vector<uint8_t> room(3 * LLAMA_EXPERT_IO_ALIGN + N_ROUTER);
    uint8_t *            page = room.data() + LLAMA_EXPERT_IO_ALIGN - (uintptr_t) room.data() % LLAMA_EXPERT_IO_ALIGN;

    uint64_t   res = LLAMA_EXPERT_HASH_START;
    const auto add = [&res](const std::string & text) { res = llama_expert_hash(res, text.c_str(), text.size() + 1); };
    for (const auto & group : tensors) {
        for (const ggml_tensor * t : group) {
            add(t->name);
            add(std::to_string(t->ne[2]));
            add(std::to_string(t->nb[2]));
        }
        const std::string name   = group[0]->name;
        const auto *      router = ml.get_weight((name.substr(0, name.find(".ffn_")) + ".ffn_gate_inp.weight").c_str());
        if (router == nullptr) {
            continue;
        }
        const size_t n = std::min(ggml_nbytes(router->tensor), N_ROUTER);
        if (const std::string err = files.read(router->idx, router->offs, n, page); !err.empty()) {
            throw std::runtime_error(files.name(router->idx) + ": cannot read the router of " + name + ": " + err);
        }
        res = llama_expert_hash(res, page + router->offs % LLAMA_EXPERT_IO_ALIGN, n);
    }
    return res;
}

void llama_experts::read_hot_set(const llama_model_loader & ml) {
    std::vector<int> n_experts;
    for (const auto & group : tensors) {
        n_experts.push_back(group[0]->ne[2]);
    }
    const uint64_t model   = identity(*files, ml, tensors);
    bool           missing = false;

    warm_state = llama_expert_hot_set_read(config.warm, model, n_experts, hot, missing);
    hot.model  = model;
    if (missing) {
        if (const std::string err = llama_expert_hot_set_writable(config.warm); !err.empty()) {
            throw std::runtime_error("the hot set " + config.warm + " is not there and cannot be written: " + err);
        }
        warm_state = "there is no such file yet";
        LLAMA_LOG_INFO("%s: expert cache: starts cold, %s will be written when the model is freed\n", __func__, config.warm.c_str());
    } else if (!warm_state.empty()) {
        LLAMA_LOG_WARN("%s: expert cache: starts cold, %s cannot be used: %s\n", __func__, config.warm.c_str(), warm_state.c_str());
    } else {
        warm_state = "loaded";
    }
}

// all experts if they fit, else the hot set
void llama_experts::load_experts() {
    std::vector<std::vector<int>> experts = hot.experts;
    if (cache->holds_all()) {
        experts.clear();
        for (const auto & group : tensors) {
            experts.emplace_back(group[0]->ne[2]);
            std::iota(experts.back().begin(), experts.back().end(), 0);
        }
        if (!config.warm.empty()) {
            warm_state = "all experts fit";
        }
    }
    if (experts.empty()) {
        return;
    }
    size_t n = 0;
    for (const auto & group : experts) {
        n += std::min<size_t>(group.size(), cache->n_slots());
    }
    LLAMA_LOG_INFO("%s: expert cache: %zu experts are read now: %s\n", __func__, n, cache->holds_all() ? "all of them fit" : config.warm.c_str());

    cache->load(experts);
    if (!choosers.empty()) {
        cache->wait_loaded(); // what is there decides about the output, the time that reads take must not
    }
}

// where all experts fit nothing was hotter than the rest
void llama_experts::write_hot_set() {
    if (config.warm.empty() || !cache || cache->holds_all() || !cache->used()) {
        return;
    }
    hot.experts = cache->hot();

    const std::string err = llama_expert_hot_set_write(config.warm, hot);
    if (!err.empty()) {
        throw std::runtime_error(err);
    }
    LLAMA_LOG_INFO("%s: expert cache: %s written\n", __func__, config.warm.c_str());
}

void llama_experts::on_context(const llama_model & model, size_t n_compute) {
    if (config.prefetch != llama_expert_config::PREFETCH_OFF && routers.empty()) {
        find_routers(model);
    }
    if (cache->n_slots() > 0) {
        return;
    }
    uint64_t available = memory_available();
    if (gpu) {
        size_t n_free, n_total;
        ggml_backend_dev_memory(gpu, &n_free, &n_total);
        // an integrated GPU has no memory of its own: both say what is left of the same
        available = cuda->integrated(gpu) ? std::min<uint64_t>(available, n_free) : n_free;
        n_compute = 0; // on a GPU what is reserved is taken
    }
    const uint64_t reserve = reserve_of(available) + n_compute;

    budget = available > reserve ? available - reserve : 0;
    budget = std::min(budget, cache->bytes_for(cache->n_slots_max()));
    if (budget < cache->bytes_floor()) {
        throw std::runtime_error(format("the expert cache needs at least %.1f MiB and finds %.1f MiB: %.1f MiB are available, %.1f MiB of them reserved for compute buffers and others",
            cache->bytes_floor() / MiB, budget / MiB, available / MiB, reserve / MiB));
    }
    LLAMA_LOG_INFO("%s: expert cache: auto chose %.1f MiB, %.1f MiB of memory are available, %.1f MiB are left for compute buffers and others\n", __func__,
        budget / MiB, available / MiB, reserve / MiB);
    allocate(cache->n_slots_for(budget));
}

//
// prefetch
//

// the data of a tensor that is a plain row of floats in host memory, nullptr if it is not
static const float * host_floats(const ggml_tensor * t, int64_t n) {
    const bool ok = t && t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && ggml_nelements(t) == n && t->buffer && ggml_backend_buffer_is_host(t->buffer);
    return ok ? (const float *) t->data : nullptr;
}

void llama_experts::find_routers(const llama_model & model) {
    const int n_embd = model.hparams.n_embd;

    int n_found = 0;
    for (size_t ig = 0; ig < tensors.size(); ig++) {
        llama_expert_router router;
        if (blocks[ig] >= 0) {
            const auto & layer    = model.layers[blocks[ig]];
            const int    n_expert = tensors[ig][0]->ne[2];

            router.n_embd        = n_embd;
            router.n_expert      = n_expert;
            router.n_expert_used = model.hparams.n_expert_used(blocks[ig]);
            router.weight        = host_floats(layer.ffn_gate_inp, (int64_t) n_embd * n_expert);
            router.bias          = host_floats(layer.ffn_gate_inp_b, n_expert);
            router.choice        = host_floats(layer.ffn_exp_probs_b, n_expert);
            router.norm          = host_floats(layer.ffn_norm ? layer.ffn_norm : layer.attn_post_norm, n_embd);
            router.sigmoid       = model.hparams.expert_gating_func == LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID;
        }
        n_found += router.weight != nullptr;
        routers.push_back(router);
    }
    if (n_found < 2 && config.prefetch == llama_expert_config::PREFETCH_AUTO) {
        LLAMA_LOG_INFO("%s: expert cache: prefetch off, this model has no routers that it can use\n", __func__);
        config.prefetch = llama_expert_config::PREFETCH_OFF;
        routers.clear();
        return;
    }
    if (n_found < 2) {
        throw std::runtime_error("expert prefetch finds no routers that it can use in this model: load it without --expert-prefetch");
    }
    if (config.prefetch == llama_expert_config::PREFETCH_AUTO) {
        cache->judge_ahead();
    }
    if (const char * wrong = getenv("LLAMA_EXPERT_TEST_FORECAST_WRONG")) {
        test_wrong = atof(wrong);
        LLAMA_LOG_WARN("%s: expert cache: TEST: a share of %g of what is forecast is replaced by other experts\n", __func__, test_wrong);
    }
}

const char * llama_experts::prefetch_name() const {
    switch (config.prefetch) {
        case llama_expert_config::PREFETCH_OFF: return "off";
        case llama_expert_config::PREFETCH_ROUTER: return "router";
        case llama_expert_config::PREFETCH_AUTO: return "auto";
    }
    return "unknown";
}

// for tests: a forecast of another precision
void llama_experts::degrade(int group, std::vector<int> & experts) {
    const auto here = cache->resident(group);

    std::vector<int> others;
    for (int e = 0; e < (int) here.size(); e++) {
        if (!here[e] && std::find(experts.begin(), experts.end(), e) == experts.end()) {
            others.push_back(e);
        }
    }
    std::shuffle(others.begin(), others.end(), test_rng);
    for (int & expert : experts) {
        if (!here[expert] && !others.empty() && std::uniform_real_distribution<>()(test_rng) < test_wrong) {
            expert = others.back();
            others.pop_back();
        }
    }
}

// the call of a group has begun with this input: what will the next layer need?
void llama_experts::prefetch(int group, const ggml_tensor * input) {
    static constexpr int64_t N_TOKENS_MAX = 8; // more choose most experts anyway

    const auto is_usable = [](const llama_expert_router & r) { return r.weight != nullptr; };
    const auto next      = std::find_if(routers.begin() + group + 1, routers.end(), is_usable);

    // gate and up take [n_embd, 1, n_tokens]
    const bool is_input = input->type == GGML_TYPE_F32 && input->nb[0] == sizeof(float) && input->ne[1] == 1 && input->ne[2] <= N_TOKENS_MAX;
    if (next == routers.end() || !is_usable(routers[group]) || !is_input || input->ne[0] != routers[group].n_embd) {
        return;
    }
    const int ig = next - routers.begin();
    if (!cache->wants_ahead(ig)) {
        return;
    }
    const int64_t t_start = ggml_time_us();

    auto experts = llama_expert_forecast(routers[group], *next, (const float *) input->data, input->ne[2], input->nb[2] / sizeof(float));

    const uint64_t t_ns = (ggml_time_us() - t_start) * 1000;
    if (test_wrong > 0.0) {
        degrade(ig, experts);
    }
    cache->read_ahead(ig, std::move(experts), t_ns);
}

//
// route bias
//

void llama_experts::find_choosers(const llama_hparams & hparams) {
    for (size_t ig = 0; ig < tensors.size(); ig++) {
        const std::string name = tensors[ig][0]->name;
        if (blocks[ig] < 0) {
            throw std::runtime_error("a route bias is not possible in this model: " + name + " follows the choice of other experts");
        }
        if (hparams.n_expert_groups > 1) {
            throw std::runtime_error(format("a route bias is not possible in this model: its routers choose groups of experts first (%d groups)", (int) hparams.n_expert_groups));
        }
        const int n_used = hparams.n_expert_used(blocks[ig]);
        if (config.route_keep >= n_used) {
            throw std::runtime_error(format("a route bias that keeps %d experts of the router has no effect where a token uses %d (%s)", config.route_keep, n_used, name.c_str()));
        }
        choosers.push_back({ this, (int) ig, {} });
    }
}

ggml_tensor * llama_experts::bias(ggml_context * ctx, ggml_tensor * scores, int il) {
    const auto it = std::find(blocks.begin(), blocks.end(), il);
    if (it == blocks.end()) {
        return scores; // experts that are in memory
    }
    return ggml_map_custom1(ctx, scores, choose, 1, &choosers[it - blocks.begin()]);
}

void llama_experts::choose(ggml_tensor * dst, const ggml_tensor * scores, int ith, int /*nth*/, void * user) {
    if (ith != 0) {
        return;
    }
    auto *       self   = (chooser *) user;
    const auto & config = self->experts->config;
    const auto   here   = self->experts->cache->resident(self->group);

    GGML_ASSERT(scores->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(scores) && scores->ne[0] == (int64_t) here.size());
    for (int64_t i = 0; i < scores->ne[1]; i++) {
        const float * src = (const float *) ((const char *) scores->data + i * scores->nb[1]);
        float *       out = (float *) ((char *) dst->data + i * dst->nb[1]);

        const auto ranking = self->bias.rank(src, here, config.route_bias, config.route_keep);
        if (ranking.empty()) {
            memcpy(out, src, here.size() * sizeof(float));
        }
        for (size_t pos = 0; pos < ranking.size(); pos++) {
            out[ranking[pos]] = -(float) pos;
        }
    }
}

//
// ggml
//

void llama_experts::source_begin(void * user, const ggml_tensor * op, int n_threads) {
    auto * self = (llama_experts *) user;

    const ggml_tensor * ids = op->src[2];

    // a view of a part of the experts has other addresses than the tensor: nothing in llama.cpp makes one
    const auto it = self->places.find(op->src[0]);
    GGML_ASSERT(it != self->places.end() && "MUL_MAT_ID on a view of an expert tensor");

    const bool first = self->cache->begin(it->second.group, it->second.tensor, (const char *) ids->data, ids->ne[0], ids->ne[1], ids->nb[0], ids->nb[1], n_threads);
    if (first && !self->routers.empty()) {
        self->prefetch(it->second.group, op->src[1]);
    }
}

int llama_experts::source_next(void * user, int ith, const void ** data) {
    return ((llama_experts *) user)->cache->next(ith, data);
}

ggml_cuda_expert_source llama_experts::cuda_source(llama_experts * self) {
    ggml_cuda_expert_source res = {};
    res.user                    = self;

    res.begin = [](void * user, const ggml_tensor * op, const int32_t * ids) {
        auto *       self = (llama_experts *) user;
        const auto   it   = self->places.find(op->src[0]);
        const auto & ne   = op->src[2]->ne;
        GGML_ASSERT(it != self->places.end() && "MUL_MAT_ID on a view of an expert tensor");

        self->cache->begin(it->second.group, it->second.tensor, (const char *) ids, ne[0], ne[1], sizeof(int32_t), ne[0] * sizeof(int32_t), 1);

        return !self->cache->streamed();
    };
    res.next = [](void * user, bool wait, const void ** data) {
        return ((llama_experts *) user)->cache->next_held(data, wait);
    };
    res.leave = [](void * user, int expert) {
        ((llama_experts *) user)->cache->leave(expert);
    };
    res.slots = [](void * user, const ggml_tensor * tensor) {
        auto *     self = (llama_experts *) user;
        const auto it   = self->places.find(tensor);

        ggml_cuda_expert_slots res;
        res.base = self->cache->slots(it->second.group, it->second.tensor, &res.stride);
        res.n    = std::min<int>(self->cache->n_slots(), tensor->ne[2]);

        return res;
    };
    res.timed = [](void * user, const ggml_tensor * op, uint64_t ids_ns, uint64_t remap_ns) {
        auto * self = (llama_experts *) user;
        self->cache->count_device(self->places.find(op->src[0])->second.group, ids_ns, remap_ns);
    };
    res.failed = [](void * user, const char * what) {
        ((llama_experts *) user)->cache->set_error(what);
    };
    return res;
}

//
// C API
//

bool llama_expert_cache_get_info(const llama_model * model, llama_expert_cache_info * info, size_t size) {
    if (!model->experts || !model->experts->cache) {
        return false;
    }
    const auto & experts = *model->experts;
    const auto & cache   = *experts.cache;

    llama_expert_cache_info res = {};
    res.budget                  = experts.budget;
    res.used                    = cache.n_slots() > 0 ? cache.bytes_for(cache.n_slots()) : 0;
    res.floor                   = cache.bytes_floor();
    res.expert_bytes            = cache.bytes_experts();
    res.n_layers                = cache.n_groups();
    res.n_slots                 = cache.n_slots();
    res.n_threads               = experts.config.n_threads;
    res.policy                  = llama_expert_policy_name(experts.config.policy);
    res.io                      = llama_expert_io_mode_name(experts.files->mode());
    res.prefetch                = experts.prefetch_name();
    res.kernels                 = experts.kernels();
    res.route_bias              = experts.config.route_bias;
    res.route_keep              = experts.config.route_bias > 0.0 ? experts.config.route_keep : 0;
    res.verify                  = cache.verifies();
    res.warm                    = experts.warm_state.c_str();
    res.bytes_loaded            = cache.bytes_loaded();
    memcpy(info, &res, std::min(size, sizeof(res)));

    return true;
}

bool llama_expert_cache_get_stats(const llama_model * model, int32_t il, llama_expert_cache_stats * stats, size_t size) {
    if (!model->experts || !model->experts->cache || il >= model->experts->cache->n_groups()) {
        return false;
    }
    const auto c = model->experts->cache->counters(il);

    llama_expert_cache_stats res = {};
    res.calls                    = c.calls;
    res.calls_streamed           = c.calls_streamed;
    res.hits                     = c.hits;
    res.misses                   = c.misses;
    res.evictions                = c.evictions;
    res.bytes_demand             = c.bytes_demand;
    res.bytes_prefetch           = c.bytes_ahead;
    res.reads                    = c.reads;
    res.stall_ns                 = c.stall_ns;
    res.read_ns                  = c.read_ns;
    res.hits_prefetch            = c.hits_ahead;
    res.bytes_prefetch_used      = c.bytes_used;
    res.reads_wrong              = c.reads_wrong;
    res.ids_ns                   = c.ids_ns;
    res.remap_ns                 = c.remap_ns;
    res.forecasts                = c.forecasts;
    res.forecasts_read           = c.forecasts_read;
    res.forecast_experts         = c.forecast_experts;
    res.forecast_used            = c.forecast_used;
    res.forecast_needed          = c.forecast_needed;
    res.forecast_ns              = c.forecast_ns;
    memcpy(stats, &res, std::min(size, sizeof(res)));

    return true;
}

void llama_expert_cache_wait(const llama_model * model) {
    if (model->experts && model->experts->cache) {
        model->experts->cache->wait_loaded();
    }
}

void llama_expert_cache_reset_stats(llama_model * model) {
    if (model->experts && model->experts->cache) {
        model->experts->cache->reset_counters();
    }
}

const char * llama_expert_cache_last_error(const llama_model * model) {
    return model->experts && model->experts->cache ? model->experts->cache->last_error() : "";
}

bool llama_expert_cache_flip_byte(llama_model * model, int32_t il) {
    return model->experts && model->experts->cache && il >= 0 && il < model->experts->cache->n_groups() && model->experts->cache->flip_byte(il);
}
