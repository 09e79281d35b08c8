#include "server-expert.h"

#include "llama-expert.h"

#include <algorithm>
#include <iomanip>
#include <sstream>
#include <vector>

//
// server_histogram
//

void server_histogram::observe(int64_t t_us, uint64_t n) {
    const auto it = std::lower_bound(BOUNDS.begin(), BOUNDS.end(), t_us / 1e6);
    counts[it - BOUNDS.begin()] += n;
    sum_us += t_us * (int64_t) n;
}

void server_histogram::print(std::ostream & out, const char * name, const char * help) const {
    out << "# HELP " << name << " " << help << "\n"
        << "# TYPE " << name << " histogram\n";
    uint64_t n = 0;
    for (size_t i = 0; i < BOUNDS.size(); i++) {
        n += counts[i];
        out << name << "_bucket{le=\"" << BOUNDS[i] << "\"} " << n << "\n";
    }
    n += counts.back();
    out << name << "_bucket{le=\"+Inf\"} " << n << "\n"
        << name << "_sum " << std::setprecision(15) << sum_us / 1e6 << std::setprecision(6) << "\n"
        << name << "_count " << n << "\n";
}

//
// server_expert_storage
//

std::string server_expert_storage::on_decode(const llama_model * model, int ret) {
    // a full context (1) or an invalid batch (-1) tells nothing about storage
    const std::string reason = ret < -1 ? llama_expert_cache_last_error(model) : "";

    std::lock_guard<std::mutex> lock(mutex);
    if (ret == 0) {
        text.clear();
    } else if (!reason.empty()) {
        text     = reason;
        t_failed = ggml_time_us();
        count++;
    }
    return reason;
}

std::string server_expert_storage::error() const {
    std::lock_guard<std::mutex> lock(mutex);

    return ggml_time_us() - t_failed < T_RED_US ? text : "";
}

uint64_t server_expert_storage::n_failed() const {
    std::lock_guard<std::mutex> lock(mutex);

    return count;
}

//
// metrics
//

std::string server_expert_metrics(const llama_model * model, const server_expert_storage & storage) {
    llama_expert_cache_info info;
    if (!llama_expert_cache_get_info(model, &info, sizeof(info))) {
        return "";
    }

    std::stringstream out;
    out << std::setprecision(15);

    const auto head = [&out](const char * name, const char * type, const char * help) {
        out << "# HELP remoe_expert_cache_" << name << " " << help << "\n"
            << "# TYPE remoe_expert_cache_" << name << " " << type << "\n";
    };
    const auto single = [&](const char * name, const char * type, const char * help, uint64_t value) {
        head(name, type, help);
        out << "remoe_expert_cache_" << name << " " << value << "\n";
    };

    single("budget_bytes", "gauge", "Bytes that slots and metadata may take", info.budget);
    single("used_bytes", "gauge", "Bytes that slots and metadata take", info.used);
    single("floor_bytes", "gauge", "Least budget that can work", info.floor);
    single("expert_bytes", "gauge", "Bytes of all expert weights in the file", info.expert_bytes);
    single("slots", "gauge", "Slots of each MoE layer", info.n_slots);
    single("failed_decodes_total", "counter", "Evaluations that failed because an expert could not be read", storage.n_failed());
    single("storage_failing", "gauge", "1 while /health is red because an expert could not be read", !storage.error().empty());

    head("info", "gauge", "What was decided at load");
    out << "remoe_expert_cache_info{policy=\"" << info.policy << "\",io=\"" << info.io << "\",kernels=\"" << info.kernels
        << "\",prefetch=\"" << info.prefetch << "\",layers=\"" << info.n_layers << "\"} 1\n";

    std::vector<llama_expert_cache_stats> stats(info.n_layers);
    for (uint32_t il = 0; il < info.n_layers; il++) {
        llama_expert_cache_get_stats(model, il, &stats[il], sizeof(stats[il]));
    }
    static const struct {
        const char * name;
        const char * help;
        uint64_t llama_expert_cache_stats::* value;
        double                               scale;
    } counters[] = {
        { "calls_total",            "Evaluations of the layer",                                  &llama_expert_cache_stats::calls,            1    },
        { "calls_streamed_total",   "Evaluations that needed more experts than there are slots", &llama_expert_cache_stats::calls_streamed,   1    },
        { "hits_total",             "Distinct experts of an evaluation found in a slot",         &llama_expert_cache_stats::hits,             1    },
        { "misses_total",           "Distinct experts of an evaluation read from storage",       &llama_expert_cache_stats::misses,           1    },
        { "hits_prefetch_total",    "Of the hits, experts that were read ahead",                 &llama_expert_cache_stats::hits_prefetch,    1    },
        { "evictions_total",        "Experts that lost their slot",                              &llama_expert_cache_stats::evictions,        1    },
        { "reads_total",            "Read requests",                                             &llama_expert_cache_stats::reads,            1    },
        { "reads_wrong_total",      "Reads that gave wrong bytes and were made once more",       &llama_expert_cache_stats::reads_wrong,      1    },
        { "bytes_demand_total",     "Bytes read because an evaluation needed them",              &llama_expert_cache_stats::bytes_demand,     1    },
        { "bytes_prefetch_total",   "Bytes read ahead",                                          &llama_expert_cache_stats::bytes_prefetch,   1    },
        { "forecasts_total",        "Evaluations before which their experts were forecast",      &llama_expert_cache_stats::forecasts,        1    },
        { "forecasts_read_total",   "Of these, evaluations for which experts were read ahead",   &llama_expert_cache_stats::forecasts_read,   1    },
        { "forecast_experts_total", "Experts that were forecast and were in no slot",            &llama_expert_cache_stats::forecast_experts, 1    },
        { "forecast_used_total",    "Of these, experts that the evaluation needed",              &llama_expert_cache_stats::forecast_used,    1    },
        { "forecast_needed_total",  "Experts that these evaluations needed and had no slot",     &llama_expert_cache_stats::forecast_needed,  1    },
        { "stall_seconds_total",    "Time that compute waited with no expert ready",             &llama_expert_cache_stats::stall_ns,         1e-9 },
        { "read_seconds_total",     "Sum over reader threads of the time spent in reads",        &llama_expert_cache_stats::read_ns,          1e-9 },
    };
    for (const auto & counter : counters) {
        head(counter.name, "counter", counter.help);
        for (uint32_t il = 0; il < info.n_layers; il++) {
            out << "remoe_expert_cache_" << counter.name << "{layer=\"" << il << "\"} " << stats[il].*counter.value * counter.scale << "\n";
        }
    }

    return out.str();
}
