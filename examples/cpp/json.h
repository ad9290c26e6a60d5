// Reading JSON, as far as the header of a detector's file needs it. Depth is bounded here, length by who reads a file.

#pragma once

#include <charconv>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace efficientad {

// What went wrong, as a sentence for a person.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  static Json parse(std::string_view text) {
    Reader reader{text};
    Json value = reader.value(0);
    reader.skip_spaces();
    reader.require(reader.next == text.size(), "one value and no more");
    return value;
  }

  bool is_null() const { return kind_ == Kind::null; }

  // The member of an object.
  const Json& at(const std::string& name) const {
    const Json* const found = find(name);
    if (found == nullptr) {
      throw Error("\"" + name + "\" is missing in it");
    }
    return *found;
  }

  const Json* find(const std::string& name) const {
    require(Kind::object, "an object");
    for (std::size_t index = 0; index < names_.size(); ++index) {
      if (names_[index] == name) {
        return &items_[index];
      }
    }
    return nullptr;
  }

  const std::vector<Json>& items() const {
    require(Kind::array, "a list");
    return items_;
  }

  const std::string& text() const {
    require(Kind::text, "text");
    return text_;
  }

  bool boolean() const {
    require(Kind::boolean, "true or false");
    return number_ != 0;
  }

  double number() const {
    require(Kind::number, "a number");
    return number_;
  }

  int64_t integer() const {
    const double found = number();
    constexpr double exact = 9007199254740992;  // 2^53
    if (!(found >= -exact && found <= exact) || static_cast<double>(static_cast<int64_t>(found)) != found) {
      throw Error("a whole number is expected in it");
    }
    return static_cast<int64_t>(found);
  }

 private:
  enum class Kind { null, boolean, number, text, array, object };

  void require(Kind kind, const char* expected) const {
    if (kind_ != kind) {
      throw Error(std::string(expected) + " is expected in it, where something else stands");
    }
  }

  struct Reader {
    std::string_view input;
    std::size_t next = 0;

    void require(bool fine, const char* expected) const {
      if (!fine) {
        throw Error("it is no JSON, at byte " + std::to_string(next) + ", where it should have " + expected);
      }
    }

    bool take(std::string_view word) {
      const bool found = input.substr(next, word.size()) == word;
      next += found ? word.size() : 0;
      return found;
    }

    void skip_spaces() {
      while (next < input.size() && std::string_view(" \t\r\n").find(input[next]) != std::string_view::npos) {
        ++next;
      }
    }

    Json value(int depth) {
      require(depth < 64, "less than 64 levels");
      skip_spaces();
      require(next < input.size(), "a value");
      Json found;
      if (take("{")) {
        found.kind_ = Kind::object;
        list("}", [&] {
          skip_spaces();
          require(take("\""), "a name in quotes");
          found.names_.push_back(text());
          skip_spaces();
          require(take(":"), "a colon");
          found.items_.push_back(value(depth + 1));
        });
      } else if (take("[")) {
        found.kind_ = Kind::array;
        list("]", [&] { found.items_.push_back(value(depth + 1)); });
      } else if (take("\"")) {
        found.kind_ = Kind::text;
        found.text_ = text();
      } else if (take("null")) {
        found.kind_ = Kind::null;
      } else if (take("true")) {
        found.kind_ = Kind::boolean;
        found.number_ = 1;
      } else if (take("false")) {
        found.kind_ = Kind::boolean;
      } else {
        found.kind_ = Kind::number;
        found.number_ = number();
      }
      return found;
    }

    template <typename Item>
    void list(const char* end, Item item) {
      skip_spaces();
      if (take(end)) {
        return;
      }
      do {
        item();
        skip_spaces();
      } while (take(","));
      require(take(end), "a comma or the end of the list");
    }

    // After the opening quote.
    std::string text() {
      std::string found;
      while (true) {
        require(next < input.size(), "a closing quote");
        const char letter = input[next++];
        if (letter == '"') {
          return found;
        }
        if (letter != '\\') {
          found += letter;
          continue;
        }
        require(next < input.size(), "an escaped letter");
        const char escaped = input[next++];
        constexpr std::string_view letters = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
        const std::size_t which = letters.find(escaped);
        if (which != std::string_view::npos) {
          found += meant[which];
        } else {
          require(escaped == 'u' && input.size() - next >= 4, "an escape that exists");
          next += 4;
          found += '?';  // nothing that is read here is spelt so
        }
      }
    }

    // Python writes infinities and NaN as words.
    double number() {
      const bool negative = take("-");
      double found = 0;
      if (take("Infinity")) {
        found = std::numeric_limits<double>::infinity();
      } else if (take("NaN")) {
        found = std::numeric_limits<double>::quiet_NaN();
      } else {
        require(next < input.size() && input[next] >= '0' && input[next] <= '9', "a value");
        const auto end = std::from_chars(input.data() + next, input.data() + input.size(), found);
        require(end.ec == std::errc(), "a number in double's range");
        next = static_cast<std::size_t>(end.ptr - input.data());
      }
      return negative ? -found : found;
    }
  };

  Kind kind_ = Kind::null;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;         // of an array or an object
  std::vector<std::string> names_;  // of an object's items
};

}  // namespace efficientad
