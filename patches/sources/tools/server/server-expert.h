#pragma once

#include "llama.h"

#include <array>
#include <cstdint>
#include <mutex>
#include <ostream>
#include <string>

// What the expert cache (llama-expert.h) adds to the server: its metrics, latency histograms, and the state of the
// storage that experts are read from.

// Prometheus histogram of durations
class server_histogram {
public:
    void observe(int64_t t_us, uint64_t n = 1);
    void print(std::ostream & out, const char * name, const char * help) const;

private:
    static constexpr std::array<double, 15> BOUNDS = { 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300 }; // seconds

    std::array<uint64_t, BOUNDS.size() + 1> counts = {}; // the last one is above all bounds
    int64_t                                 sum_us = 0;
};

// Whether experts can be read: a failed read makes it red until a decode succeeds, or for a minute. The minute is for
// whoever stops sending requests while it is red, as a load balancer does: without requests no decode could succeed.
class server_expert_storage {
public:
    // after every decode, with what it returned; the text of the failed read, "" if that was not the reason
    std::string on_decode(const llama_model * model, int ret);

    // "" if storage is fine; may be called from any thread
    std::string error() const;

    uint64_t n_failed() const;

private:
    static constexpr int64_t T_RED_US = 60 * 1000 * 1000;

    mutable std::mutex mutex;
    std::string        text;
    int64_t            t_failed = 0;
    uint64_t           count    = 0;
};

// counters and gauges of the expert cache in Prometheus' text format, "" if the model has none
std::string server_expert_metrics(const llama_model * model, const server_expert_storage & storage);
