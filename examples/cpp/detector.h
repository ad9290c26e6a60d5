// A detector of efficientad_fast, on the CPU and without Python.

#pragma once

#include "json.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace efficientad {

// RGB, rows from the top, three bytes a pixel.
struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> pixels;
};

struct Prediction {
  float score = 0;         // unbounded; of good images mostly below the threshold
  bool anomalous = false;  // whether the score is above the threshold
  int64_t height = 0, width = 0;
  std::vector<float> anomaly_map;  // height * width numbers, at the size the networks see
};

class Detector {
 public:
  // Reads a file that `Detector.save` or `efficientad-fast train` wrote. Throws an Error, in a sentence.
  static Detector load(const std::string& path);

  // Throws an Error where the image is none, or the networks make NaN of it. For one thread at a time, because buffers
  // are kept.
  Prediction predict(const Image& image);

  double threshold() const;

  Detector(Detector&&) noexcept;
  Detector& operator=(Detector&&) noexcept;
  ~Detector();

 private:
  struct Plan;
  explicit Detector(std::unique_ptr<Plan> plan);
  std::unique_ptr<Plan> plan_;
};

}  // namespace efficientad
