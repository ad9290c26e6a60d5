// One image through a detector: its score to standard output, its anomaly map to files.

#include "detector.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

namespace {

using efficientad::Error;
using efficientad::Image;
using efficientad::Prediction;

constexpr const char* kUsage =
    "usage: detect DETECTOR.safetensors IMAGE.ppm [--map MAP.pgm] [--raw MAP.f32] [--runs N]\n"
    "\n"
    "IMAGE is a binary PPM or PGM file of 8 bits. --map writes the anomaly map for looking at, --raw its numbers:\n"
    "float32, row by row. --runs predicts so many times and says how long one takes.\n";

// Of a PNM file's header: spaces and comments before it are skipped, and the one letter behind it.
int64_t header_number(const std::string& bytes, std::size_t& next) {
  while (next < bytes.size() && (std::isspace(static_cast<unsigned char>(bytes[next])) || bytes[next] == '#')) {
    next = bytes[next] == '#' ? std::min(bytes.find('\n', next), bytes.size()) : next + 1;
  }
  int64_t number = 0;
  const std::size_t first = next;
  for (; next < bytes.size() && bytes[next] >= '0' && bytes[next] <= '9'; ++next) {
    number = std::min<int64_t>(10 * number + (bytes[next] - '0'), int64_t{1} << 30);  // products of two do not overflow
  }
  return next++ > first ? number : -1;
}

Image read_image(const std::string& path) {
  std::error_code missing;
  const bool regular = std::filesystem::is_regular_file(path, missing);
  std::string bytes(regular ? std::filesystem::file_size(path) : 0, '\0');
  std::ifstream file(path, std::ios::binary);
  if (bytes.empty() || !file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw Error(path + " cannot be read, or is empty.");
  }
  const bool colour = bytes.compare(0, 2, "P6") == 0;
  if (!colour && bytes.compare(0, 2, "P5") != 0) {
    throw Error(path + " is no binary PPM or PGM file (P6 or P5), and no others are supported.");
  }
  std::size_t next = 2;
  Image image;
  image.width = header_number(bytes, next);
  image.height = header_number(bytes, next);
  const int64_t white = header_number(bytes, next);
  if (image.width < 1 || image.height < 1 || white < 1) {
    throw Error(path + " has no width, height and white in its header.");
  }
  if (white != 255) {
    throw Error(path + " has " + std::to_string(white) + " for white, and only 8 bits (255) are supported.");
  }
  const int64_t pixels = image.width * image.height;
  if (static_cast<int64_t>(bytes.size()) - static_cast<int64_t>(next) < pixels * (colour ? 3 : 1)) {
    throw Error(path + " ends before its last pixel.");
  }
  image.pixels.resize(pixels * 3);
  for (int64_t index = 0; index < pixels * 3; ++index) {
    image.pixels[index] = static_cast<uint8_t>(bytes[next + (colour ? index : index / 3)]);  // grey is repeated
  }
  return image;
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) {
    throw Error(path + " cannot be written.");
  }
}

// Black is 0, or the smallest of what is negative; the threshold lies in the middle third of the greys where it can, as
// in the package's reports.
void write_map(const std::string& path, const Prediction& prediction, double threshold) {
  const std::vector<float>& map = prediction.anomaly_map;
  const bool scaled = std::isfinite(threshold) && threshold > 0;
  const double low = scaled ? 0 : std::min(0.0, double{*std::min_element(map.begin(), map.end())});
  const double highest = *std::max_element(map.begin(), map.end());
  const double high = scaled ? std::clamp(highest, 1.5 * threshold, 3 * threshold) : highest;
  std::string bytes = "P5\n" + std::to_string(prediction.width) + " " + std::to_string(prediction.height) + "\n255\n";
  for (const float value : map) {
    const double share = high > low ? (value - low) / (high - low) : 0;
    const double grey = share < 1 ? std::max(share, 0.0) : 1;  // of an infinity by an infinity: look here
    bytes += static_cast<char>(static_cast<unsigned char>(std::lround(255 * grey)));
  }
  write_file(path, bytes);
}

void write_raw(const std::string& path, const Prediction& prediction) {
  std::string bytes(prediction.anomaly_map.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), prediction.anomaly_map.data(), bytes.size());
  write_file(path, bytes);
}

struct Arguments {
  std::string detector, image, map, raw;
  int runs = 1;
};

bool parse(int count, char** words, Arguments& arguments) {
  std::vector<std::string> files;
  for (int index = 1; index < count; ++index) {
    const std::string word = words[index];
    const bool option = word == "--map" || word == "--raw" || word == "--runs";
    if (!option) {
      files.push_back(word);
      continue;
    }
    if (++index == count) {
      return false;
    }
    if (word == "--runs") {
      arguments.runs = std::atoi(words[index]);
    } else {
      (word == "--map" ? arguments.map : arguments.raw) = words[index];
    }
  }
  if (files.size() != 2 || arguments.runs < 1) {
    return false;
  }
  arguments.detector = files[0];
  arguments.image = files[1];
  return true;
}

void run(const Arguments& arguments) {
  efficientad::Detector detector = efficientad::Detector::load(arguments.detector);
  const Image image = read_image(arguments.image);
  Prediction prediction;
  std::vector<double> milliseconds;
  for (int index = 0; index < arguments.runs; ++index) {
    const auto start = std::chrono::steady_clock::now();
    prediction = detector.predict(image);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    milliseconds.push_back(taken.count());
  }
  std::printf("score %.9g, %s the threshold %.9g: %s\n", prediction.score,
              prediction.anomalous ? "above" : "not above", detector.threshold(),
              prediction.anomalous ? "anomalous" : "good");
  if (arguments.runs > 1) {
    std::nth_element(milliseconds.begin(), milliseconds.begin() + arguments.runs / 2, milliseconds.end());
    std::printf("median of %d predictions: %.2f ms\n", arguments.runs, milliseconds[arguments.runs / 2]);
  }
  if (!arguments.map.empty()) {
    write_map(arguments.map, prediction, detector.threshold());
  }
  if (!arguments.raw.empty()) {
    write_raw(arguments.raw, prediction);
  }
}

}  // namespace

int main(int count, char** words) {
  Arguments arguments;
  if (!parse(count, words, arguments)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  try {
    run(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
