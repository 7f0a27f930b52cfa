import hashlib
import io
import json
import tarfile
import zipfile

import pytest
import torch

from flowturbo.data.caching import cache_latents
from flowturbo.data.options import CachingOptions
from flowturbo.data.packed import open_images
from flowturbo.data.pictures import from_uint8
from flowturbo.system.distributed import World


class Encoder:
    """Moments from means over 2x2 pixels: what an autoencoder has of methods, at no cost."""

    factor = 2

    def __init__(self, weights=(1.0, -0.5)):
        self.weights, self.dtype, self.encoded = weights, torch.float32, 0

    def fingerprint(self):
        return hashlib.sha256(repr(self.weights).encode()).hexdigest()

    def moments(self, images):
        self.encoded += len(images)
        small = torch.nn.functional.avg_pool2d(images.to(self.dtype), 2)
        return torch.cat([small * weight for weight in self.weights], dim=1)

    def of_bytes(self, image):
        """The moments of one uint8 image (3, H, W), as an array."""
        return self.moments(from_uint8(torch.from_numpy(image.copy())[None]))[0].numpy()

    def to(self, dtype):
        self.dtype = dtype


@pytest.fixture(scope="session")
def encoder():
    return Encoder


@pytest.fixture(scope="session")
def cached():
    """cached(images, root, encoder, **options) -> what caching the latents of a folder has done, in this process."""

    def cache(images, root, encoder=None, image_size=16, background="white", **options):
        options = CachingOptions(**{"batch_size": 3, "shard_size": 4, "num_workers": 0, **options})
        data = open_images(images, image_size, background=background)
        world = World(0, 0, 1, torch.device("cpu"))
        return cache_latents(data, encoder or Encoder(), "tiny", root, options, world)

    return cache


def pack_zip(files, path, method=zipfile.ZIP_STORED):
    """Write the files {name: bytes} as a zip."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def pack_tar(files, path, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pack_parquet(columns, path, features=None, rows_in_group=3):
    """Write columns as a parquet table, with what Hugging Face's datasets say of them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=rows_in_group)


@pytest.fixture(scope="session")
def pack():
    """The writers of packed files, by their suffixes."""
    return {".zip": pack_zip, ".tar": pack_tar, ".parquet": pack_parquet}
