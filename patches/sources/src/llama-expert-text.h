#pragma once

#include <cstddef>
#include <string>

// Small text files of the expert cache: read as far as is allowed, written whole or not at all.

// The first n_max bytes of a regular file. Returns "" or what went wrong; missing: there is no such file.
std::string llama_expert_text_read(const std::string & path, size_t n_max, std::string & res, bool & missing);

// Returns "" or what went wrong.
std::string llama_expert_text_write(const std::string & path, const std::string & text);
