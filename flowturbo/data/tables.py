"""Images in parquet tables, as Hugging Face publishes them: a row holds an image {bytes, path} and other columns."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from flowturbo.data.images import ImageBytes

LARGEST_GROUP = 2**31  # bytes of images that are unpacked at once: those of a row group
AT_ONCE = 2**20  # bytes that are hashed at once


class MissingReader(ValueError):
    """A package that reads a kind of file is not installed."""


class TabledImages:
    """The images in parquet tables of the same columns, in the order of the rows, and the other columns.

    `image` is the column with the images: "image", or the only one that holds such. An image is read with its whole row
    group, and the last of these is kept. It can be pickled, and read after a fork. Raises MissingReader without
    pyarrow, and ValueError naming the table, and the row, where one is damaged or holds no images.
    """

    def __init__(self, files: Sequence[str]):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise MissingReader(f"reading {files[0]!r} needs pyarrow, which is not installed") from None
        self.files, self.skipped = list(files), dict[str, int]()
        self._footers = [_footer(file) for file in self.files]
        self._schema = self._footers[0].schema.to_arrow_schema()
        for file, footer in zip(self.files, self._footers):
            if footer.schema.to_arrow_schema().names != self._schema.names:
                raise ValueError(f"{file} has other columns than {self.files[0]}")
        self.image = self._find_image()
        self._groups = [(k, group) for k, footer in enumerate(self._footers) for group in range(footer.num_row_groups)]
        rows = [self._footers[k].row_group(group).num_rows for k, group in self._groups]
        self._ends = list(accumulate(rows))  # of the row groups, in rows
        self._last: tuple[int, Any] = (-1, None)  # the row group that was read last: number, values

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": (-1, None)}

    @property
    def names(self) -> list[str]:
        """What tells the rows apart: the table's name and the number of the row in it."""
        return [
            f"{os.path.basename(file)}/{k}" for file, t in zip(self.files, self._footers) for k in range(t.num_rows)
        ]

    @property
    def fields(self) -> list[str]:
        """The columns beside the images."""
        return [name for name in self._schema.names if name != self.image]

    def file(self, index: int) -> str:
        """The table that image number `index` lies in."""
        return self.files[self._groups[bisect_right(self._ends, index)][0]]

    def where(self, index: int) -> str:
        """What messages call image number `index`."""
        file = self.file(index)
        first = sum(footer.num_rows for footer in self._footers[: self.files.index(file)])
        return f"{file}: row {index - first}"

    def read(self, index: int) -> ImageBytes:
        """An image as it is stored, encoded. Raises ValueError naming the row where it is not there."""
        number = bisect_right(self._ends, index)
        values = self._group(number)
        content = values[index - self._ends[number] + len(values)].as_py()
        if isinstance(content, Mapping):
            content = content.get("bytes")
        if not content:
            raise ValueError(f"{self.where(index)} holds no image bytes")
        return ImageBytes(self.where(index), content)

    def column(self, field: str) -> list[Any]:
        """A column, with the value of every row."""
        return [value for k in range(len(self.files)) for value in self._table(k, field, None)[field].to_pylist()]

    def class_names(self, field: str) -> list[str] | None:
        """The names of the classes in a column of class numbers, where the table says that it is one."""
        feature = self._features().get(field)
        names = feature.get("names") if isinstance(feature, Mapping) else None
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def pieces(self) -> list[tuple[str, int]]:
        """Name and size of everything that the data are known by: of the images of each row group."""
        return [(f"{os.path.basename(self.files[k])}/{group}", self._extent(k, group)[1]) for k, group in self._groups]

    def digest(self, piece: int) -> str:
        """The sha256 of a piece's content."""
        file, group = self._groups[piece]
        offset, size = self._extent(file, group)
        digest = hashlib.sha256()
        with open(self.files[file], "rb") as opened:
            opened.seek(offset)
            for start in range(0, size, AT_ONCE):
                digest.update(opened.read(min(AT_ONCE, size - start)))
        return digest.hexdigest()

    def _group(self, number: int) -> Any:
        """The images of a row group, by its number over all tables."""
        held, values = self._last  # in one go, since threads replace it
        if held != number:
            file, group = self._groups[number]
            column = self._bytes_column(file, group)
            if (size := column.total_uncompressed_size) > LARGEST_GROUP:
                what = f"{self.files[file]}: row group {group} holds {size:,} bytes"
                raise ValueError(f"{what}, expected at most {LARGEST_GROUP:,}")
            values = self._table(file, column.path_in_schema, group)[self.image]
            self._last = (number, values)
        return values

    def _table(self, file: int, column: str, group: int | None) -> Any:
        """A column of a table, or of a row group of it."""
        import pyarrow
        import pyarrow.parquet as parquet

        try:  # without threads, which a fork would lose
            with parquet.ParquetFile(self.files[file], metadata=self._footers[file], pre_buffer=False) as opened:
                settings: dict[str, Any] = {"columns": [column], "use_threads": False}
                return opened.read(**settings) if group is None else opened.read_row_group(group, **settings)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.files[file]}: {column} is damaged: {error}") from None

    def _find_image(self) -> str:
        """The column with the images. Raises ValueError where there is none."""
        import pyarrow

        def holds_bytes(kind: Any) -> bool:
            if pyarrow.types.is_struct(kind):
                kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
            return kind is not None and (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

        found = [field.name for field in self._schema if holds_bytes(field.type)]
        if "image" in found or len(found) == 1:
            return "image" if "image" in found else found[0]
        raise ValueError(
            f"{self.files[0]} has the columns {', '.join(self._schema.names)}: expected image, with bytes or "
            "{bytes, path}"
        )

    def _features(self) -> Mapping[str, Any]:
        """What Hugging Face's datasets say of the columns; empty where they do not."""
        try:
            features = json.loads((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, ValueError, TypeError):
            return {}
        return features if isinstance(features, Mapping) else {}

    def _bytes_column(self, file: int, group: int) -> Any:
        """What the footer says of the images' bytes in a row group."""
        known = self._footers[file].row_group(group)
        columns = [known.column(k) for k in range(known.num_columns)]
        return next(c for c in columns if c.path_in_schema in (self.image, f"{self.image}.bytes"))

    def _extent(self, file: int, group: int) -> tuple[int, int]:
        """Where the images' bytes of a row group begin in the file, and how many they are."""
        column = self._bytes_column(file, group)
        starts = [column.data_page_offset, column.dictionary_page_offset]
        return min(start for start in starts if start), column.total_compressed_size


def _footer(file: str) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.read_metadata(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {file!r}: a damaged parquet table ({error})") from None
