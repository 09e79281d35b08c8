#include "llama-expert-warm.h"

#include "llama-expert-text.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#ifdef __linux__
#include <unistd.h>
#endif

static const std::string MAGIC   = "remoe-edge hot set ";
static const std::string VERSION = "1";

static constexpr size_t SIZE_MAX_FILE = 16 * 1024 * 1024;

uint64_t llama_expert_hash(uint64_t hash, const void * data, size_t size) {
    for (size_t i = 0; i < size; i++) {
        hash = (hash ^ ((const uint8_t *) data)[i]) * 0x100000001b3ull;
    }
    return hash;
}

static std::string model_name(uint64_t model) {
    char res[17];
    snprintf(res, sizeof(res), "%016" PRIx64, model);
    return res;
}

static bool starts_with(const std::string & text, const std::string & start) {
    return text.compare(0, start.size(), start) == 0;
}

// a number of at most six digits; false if there is none at pos
static bool parse_number(const std::string & line, size_t & pos, int & res) {
    const size_t start = pos;
    for (res = 0; pos < line.size() && line[pos] >= '0' && line[pos] <= '9' && pos - start < 6; pos++) {
        res = res * 10 + (line[pos] - '0');
    }
    return pos > start;
}

// "3 14 1": different experts below n_expert
static bool parse_experts(const std::string & line, int n_expert, std::vector<int> & res) {
    std::vector<bool> seen(n_expert, false);
    for (size_t pos = 0; pos < line.size(); pos++) {
        int expert;
        if (!parse_number(line, pos, expert) || expert >= n_expert || seen[expert] || (pos < line.size() && (line[pos] != ' ' || pos + 1 == line.size()))) {
            return false;
        }
        seen[expert] = true;
        res.push_back(expert);
    }
    return true;
}

// text: the whole file
static std::string parse(const std::string & text, uint64_t model, const std::vector<int> & n_experts, llama_expert_hot_set & res) {
    if (!starts_with(text, MAGIC)) {
        return "it is not a hot set";
    }
    size_t     pos  = 0;
    const auto line = [&](std::string & out) {
        const size_t end = text.find('\n', pos);
        if (end == std::string::npos) {
            return false;
        }
        out = text.substr(pos, end - pos);
        pos = end + 1;
        return true;
    };
    const std::string damaged = "it is damaged";

    std::string s;
    if (!line(s)) {
        return damaged;
    }
    if (s != MAGIC + VERSION) {
        return "its version is not " + VERSION;
    }
    if (!line(s) || !starts_with(s, "model ")) {
        return damaged;
    }
    if (s != "model " + model_name(model)) {
        return "it was written for another model";
    }
    if (!line(s) || s != "layers " + std::to_string(n_experts.size())) {
        return damaged;
    }
    res.model = model;
    for (const int n_expert : n_experts) {
        res.experts.emplace_back();
        if (!line(s) || !parse_experts(s, n_expert, res.experts.back())) {
            return damaged;
        }
    }
    return line(s) && s == "end" && pos == text.size() ? "" : damaged;
}

#ifdef __linux__

std::string llama_expert_hot_set_read(const std::string & path, uint64_t model, const std::vector<int> & n_experts, llama_expert_hot_set & res, bool & missing) {
    res = {};

    std::string text;
    std::string err = llama_expert_text_read(path, SIZE_MAX_FILE, text, missing);
    if (err.empty()) {
        err = parse(text, model, n_experts, res);
    }
    if (!err.empty()) {
        res = {};
    }
    return err;
}

static std::string folder_of(const std::string & path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

std::string llama_expert_hot_set_writable(const std::string & path) {
    return access(folder_of(path).c_str(), W_OK | X_OK) == 0 ? "" : folder_of(path) + ": " + strerror(errno);
}

std::string llama_expert_hot_set_write(const std::string & path, const llama_expert_hot_set & hot) {
    std::string       start;
    bool              missing;
    const std::string err_start = llama_expert_text_read(path, MAGIC.size(), start, missing);
    if (!missing && (!err_start.empty() || (!start.empty() && start != MAGIC))) {
        return "there is a file that is no hot set, it is left as it is";
    }

    std::string text = MAGIC + VERSION + "\nmodel " + model_name(hot.model) + "\nlayers " + std::to_string(hot.experts.size()) + "\n";
    for (const auto & experts : hot.experts) {
        for (size_t i = 0; i < experts.size(); i++) {
            text += (i > 0 ? " " : "") + std::to_string(experts[i]);
        }
        text += "\n";
    }
    text += "end\n";

    return llama_expert_text_write(path, text);
}

#else

std::string llama_expert_hot_set_read(const std::string &, uint64_t, const std::vector<int> &, llama_expert_hot_set &, bool &) { return "not supported"; }
std::string llama_expert_hot_set_writable(const std::string &) { return "not supported"; }
std::string llama_expert_hot_set_write(const std::string &, const llama_expert_hot_set &) { return "not supported"; }

#endif
