"""The two files by which TFDS knows a folder: `dataset_info.json` and `features.json`.

They are what `tfds.folder_dataset.write_metadata` writes, which a test confirms; written here, they
do not cost the import of TFDS, which takes longer than preparing a small data set.
"""

from __future__ import annotations

import json
from pathlib import Path

DATASET = "proteins"  # TFDS wants a name in every file's
FEATURES = ("description", "id", "sequence")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_CLASSES = "tensorflow_datasets.core.features"


def shard_name(split: str, index: int, shards: int) -> str:
    return f"{DATASET}-{split}.array_record-{index:05d}-of-{shards:05d}"


def write(folder: Path, description: str, splits: dict[str, tuple[list[int], int]]) -> None:
    """Writes both files. `splits`: (examples of each shard, bytes of them all) by name."""
    info = {
        "description": description,
        "fileFormat": "array_record",
        "name": DATASET,
        "splits": [
            {
                "filepathTemplate": _TEMPLATE,
                "name": name,
                "numBytes": str(size),  # protobuf writes 64-bit integers as strings
                "shardLengths": [str(n) for n in lengths],
            }
            for name, (lengths, size) in splits.items()
        ],
        "version": "1.0.0",
    }
    text = {"pythonClassName": f"{_CLASSES}.text_feature.Text", "text": {}}
    features = {
        "featuresDict": {"features": dict.fromkeys(FEATURES, text)},
        "pythonClassName": f"{_CLASSES}.features_dict.FeaturesDict",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (folder / "features.json").write_text(json.dumps(features, indent=4))
