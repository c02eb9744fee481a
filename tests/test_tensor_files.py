"""Files beside a config that hold no tensors, or ones nobody could hold."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import save

from hfpatch import ConfigError, PatchConfig, patch_model
from hfpatch.config.patch_config import CONFIG_FILE, TENSOR_FILE

GOOD = save({"0.gamma": torch.ones(8)})
HUGE = json.dumps({"0.gamma": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
BAD_TENSORS = {
    "empty": b"",
    "cut off": GOOD[:-1],
    "cut off in the header": GOOD[:20],
    "longer": GOOD + b"x",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a nested header": struct.pack("<Q", 200000) + b"[" * 200000,
    "huge by its header": struct.pack("<Q", len(HUGE)) + HUGE,
    "a pickle": pickle.dumps({"0.gamma": torch.ones(8)}),
    "text": b"hello",
    "an unknown kind": struct.pack("<Q", 60)
    + b'{"0.gamma":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'.ljust(60)
    + b"1234",
    "no object": struct.pack("<Q", 2) + b"[]",
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_files_that_are_none(case: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"methods": [{"method": "zerotuning"}]}')
    (tmp_path / TENSOR_FILE).write_bytes(BAD_TENSORS[case])
    with pytest.raises(ConfigError, match="not a readable safetensors file") as error:
        PatchConfig.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tensor_as_large_as_its_header_says_is_not_read_before_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"methods": [{"method": "zerotuning"}]}')
    size = 1 << 38
    header = json.dumps({"0.gamma": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / TENSOR_FILE).open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + size)  # a file with a hole, which takes no room
    with pytest.raises(ConfigError):
        patch_model(zoo.SUPPORTED["llama"].build(num_hidden_layers=1), PatchConfig.from_pretrained(tmp_path))
