// Reading a safetensors file: eight bytes with the length of a header in JSON, the header, the tensors' bytes.
//
// Nothing in the file is believed: lengths and offsets are compared with the file's size before anything is read.

#pragma once

#include "json.h"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace efficientad {

class SafeTensors {
 public:
  explicit SafeTensors(const std::string& path) {
    std::error_code missing;
    if (!std::filesystem::is_regular_file(path, missing)) {
      throw Error("there is no such file");
    }
    const uint64_t size = std::filesystem::file_size(path);
    file_.open(path, std::ios::binary);
    unsigned char bytes[8] = {};
    read(0, reinterpret_cast<char*>(bytes), size >= 8 ? 8 : 0);
    uint64_t length = 0;
    for (int index = 7; index >= 0; --index) {
      length = length << 8 | bytes[index];
    }
    if (size < 8 || length > size - 8 || length > kMostHeader) {
      throw Error("it is no safetensors file with a header of at most 4 MiB, or it was cut off");
    }
    std::string header(length, '\0');
    read(8, header.data(), length);
    header_ = Json::parse(header);
    first_ = 8 + length;
    bytes_ = size - first_;
  }

  // The text under that name of the file's own metadata; empty where there is none.
  std::string metadata(const std::string& name) const {
    const Json* const all = header_.find("__metadata__");
    const Json* const found = all == nullptr ? nullptr : all->find(name);
    return found == nullptr ? std::string() : found->text();
  }

  // A float32 tensor, which must have that shape.
  std::vector<float> numbers(const std::string& name, const std::vector<int64_t>& shape) {
    const Json* const entry = header_.find(name);
    if (entry == nullptr) {
      throw Error("the tensor " + name + " is missing in it");
    }
    if (entry->at("dtype").text() != "F32") {
      throw Error("its tensor " + name + " is " + entry->at("dtype").text() + ", and only F32 is supported");
    }
    std::vector<int64_t> found;
    for (const Json& side : entry->at("shape").items()) {
      found.push_back(side.integer());
    }
    if (found != shape) {
      throw Error("its tensor " + name + " has shape " + text(found) + ", expected " + text(shape));
    }
    uint64_t count = 1;
    for (const int64_t side : shape) {
      count *= static_cast<uint64_t>(side);
    }
    const std::vector<Json>& offsets = entry->at("data_offsets").items();
    const int64_t begin = offsets.size() == 2 ? offsets[0].integer() : -1;
    const int64_t end = offsets.size() == 2 ? offsets[1].integer() : -1;
    if (begin < 0 || end < begin || static_cast<uint64_t>(end) > bytes_ ||
        static_cast<uint64_t>(end - begin) != count * sizeof(float)) {
      throw Error("the bytes of its tensor " + name + " are not where the header says; it was cut off or damaged");
    }
    std::vector<float> values(count);
    read(first_ + static_cast<uint64_t>(begin), reinterpret_cast<char*>(values.data()), count * sizeof(float));
    return values;
  }

 private:
  static constexpr uint64_t kMostHeader = uint64_t{4} << 20;

  static std::string text(const std::vector<int64_t>& shape) {
    std::string list;
    for (const int64_t side : shape) {
      list += (list.empty() ? "" : ", ") + std::to_string(side);
    }
    return "(" + list + ")";
  }

  void read(uint64_t from, char* into, uint64_t count) {
    file_.seekg(static_cast<std::streamoff>(from));
    file_.read(into, static_cast<std::streamsize>(count));
    if (!file_) {
      throw Error("it cannot be read");
    }
  }

  std::ifstream file_;
  Json header_;
  uint64_t first_ = 0, bytes_ = 0;  // of the tensors
};

}  // namespace efficientad
