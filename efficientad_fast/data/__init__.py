"""Images and data sets: ``decode`` reads one image, ``folders`` finds them on disk, ``samples`` draws a set."""

from efficientad_fast.data.decode import decode_image
from efficientad_fast.data.folders import (
    IMAGE_SUFFIXES,
    Dataset,
    TestImage,
    list_images,
    load_mask,
    open_dataset,
    split_validation,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "Dataset",
    "TestImage",
    "decode_image",
    "list_images",
    "load_mask",
    "open_dataset",
    "split_validation",
]
