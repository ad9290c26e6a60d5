#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <stdexcept>
#include <utility>

namespace efficientad_fast::simt {

thread_local char thread_local_marker = 0;

namespace {

constexpr const char* kGuardName = "efficientad_fast_simt_guard";
constexpr std::size_t kLeastGap = 256;

std::string demangled(const char* name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

// "void a::(anonymous namespace)::kernel<float>(P<int>)" -> "kernel<float>"
std::string short_name(std::string name) {
  int depth = 0;
  std::size_t end = name.size();
  if (!name.empty() && name.back() == ')') {
    for (std::size_t i = name.size(); i-- > 0;) {
      depth += (name[i] == ')') - (name[i] == '(');
      if (depth == 0) {
        end = i;
        break;
      }
    }
  }
  std::size_t begin = 0;
  depth = 0;
  for (std::size_t i = 0; i < end; ++i) {
    const char c = name[i];
    depth += (c == '<' || c == '(') - (c == '>' || c == ')');
    if (depth == 0 && (c == ' ' || c == ':')) {
      begin = i + 1;
    }
  }
  return name.substr(begin, end - begin);
}

int find_constants(dl_phdr_info* info, std::size_t, void* result) {
  auto& [own, ranges] = *static_cast<std::pair<std::uintptr_t, std::vector<AddressRange>>*>(result);
  bool found = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const std::uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    found = found || (header.p_type == PT_LOAD && own >= begin && own < begin + header.p_memsz);
  }
  for (int i = 0; found && i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const bool constant = header.p_type == PT_LOAD && (header.p_flags & PF_W) == 0;
    if (constant || header.p_type == PT_GNU_RELRO) {
      const std::uintptr_t begin = info->dlpi_addr + header.p_vaddr;
      ranges.push_back({begin, begin + header.p_memsz});
    }
  }
  return found;
}

}  // namespace

void Symbols::read() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&find_constants), &info) == 0) {
    throw std::runtime_error("simt: the emulator does not find its own library");
  }
  path_ = info.dli_fname;
  base_ = reinterpret_cast<std::uintptr_t>(info.dli_fbase);

  std::pair<std::uintptr_t, std::vector<AddressRange>> found{reinterpret_cast<std::uintptr_t>(&find_constants), {}};
  dl_iterate_phdr(find_constants, &found);
  constants = std::move(found.second);

  std::ifstream file(path_, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto at = [&](std::size_t offset) { return bytes.data() + offset; };
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  if (bytes.size() < sizeof(*header) || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) {
    throw std::runtime_error("simt: " + path_ + " is not an ELF file");
  }
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(at(header->e_shoff));
  bool marked = false;
  std::set<std::string> guarded;  // functions that declare shared variables; other thread-local ones are somebody's own
  std::vector<std::pair<std::string, SharedVariable>> candidates;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) {
      continue;
    }
    const char* const names = at(sections[sections[s].sh_link].sh_offset);
    const auto* entries = reinterpret_cast<const ElfW(Sym)*>(at(sections[s].sh_offset));
    for (std::size_t i = 0; i < sections[s].sh_size / sizeof(*entries); ++i) {
      const auto& entry = entries[i];
      const char* const name = names + entry.st_name;
      const int type = entry.st_info & 0xf;
      if (type == STT_FUNC && entry.st_value != 0) {
        functions_.push_back({base_ + entry.st_value, base_ + entry.st_value + entry.st_size, name});
      } else if (type == STT_TLS && entry.st_shndx != SHN_UNDEF) {
        const std::string whole = demangled(name), own = short_name(whole);
        const std::string scope = whole.substr(0, whole.size() - own.size());
        if (whole == "efficientad_fast::simt::thread_local_marker") {
          marker_offset = entry.st_value;
          marked = true;
        } else if (own.find(kGuardName) == 0) {
          guarded.insert(scope);
        } else {
          candidates.emplace_back(scope, SharedVariable{own, entry.st_value, entry.st_size});
        }
      }
    }
  }
  if (!marked) {
    throw std::runtime_error("simt: " + path_ + " has no table of symbols; link it without -s");
  }
  for (auto& [scope, variable] : candidates) {
    if (guarded.count(scope) != 0) {
      shared.push_back(std::move(variable));
    }
  }
  const auto by_offset = [](const auto& a, const auto& b) { return a.offset < b.offset; };
  std::sort(shared.begin(), shared.end(), by_offset);
  for (std::size_t i = 1; i < shared.size(); ++i) {
    if (shared[i - 1].offset + shared[i - 1].bytes + kLeastGap > shared[i].offset) {
      unguarded.push_back(shared[i - 1].name + " before " + shared[i].name);
    }
  }
}

std::string Symbols::kernel_name(const void* function) const {
  const auto address = reinterpret_cast<std::uintptr_t>(function);
  for (const auto& candidate : functions_) {
    if (candidate.begin == address) {
      return short_name(demangled(candidate.name.c_str()));
    }
  }
  return "kernel";
}

std::string Symbols::source_line(const void* address) const {
  const auto call = reinterpret_cast<std::uintptr_t>(address) - 1;
  if (address == nullptr || path_.find('\'') != std::string::npos) {
    return "";
  }
  char offset[32];
  std::snprintf(offset, sizeof(offset), "0x%zx", static_cast<std::size_t>(call - base_));
  FILE* const answer = popen(("addr2line -i -e '" + path_ + "' " + offset + " 2>/dev/null").c_str(), "r");
  if (answer == nullptr) {
    return "";
  }
  // An inlined call has a line for every function it is inlined into; the device language itself is not of interest.
  std::string found;
  char line[1024];
  while (std::fgets(line, sizeof(line), answer) != nullptr) {
    std::string text = line;
    text = text.substr(0, text.find_first_of(" \n"));  // a discriminator may follow
    const bool language = text.find("/simt/device.h:") != std::string::npos ||
                          text.find("/simt/ptx.h:") != std::string::npos;
    if (found.empty() && !language && text.find('?') == std::string::npos) {
      found = text.substr(text.rfind('/') + 1);
    }
  }
  pclose(answer);
  return found;
}

const Symbols& symbols() {
  static const Symbols once = [] {
    Symbols result;
    result.read();
    return result;
  }();
  return once;
}

}  // namespace efficientad_fast::simt
