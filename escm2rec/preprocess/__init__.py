"""Raw logs to data sets: parse, check, fit on the training split, encode, write."""

from escm2rec.preprocess.files import RawFile, raw_files
from escm2rec.preprocess.pipeline import preprocess
from escm2rec.preprocess.raw import EncodedBlock, encode_raw

__all__ = ["EncodedBlock", "RawFile", "encode_raw", "preprocess", "raw_files"]
