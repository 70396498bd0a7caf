"""Files that are whole or not there; what replaces them, and what leaves them, in `results` too."""

import os
import stat
import threading

import pytest

from jaxprune import files


def test_whole_whoever_else_writes(tmp_path):
    path, wrong = tmp_path / "file", []
    texts = [letter * 100_000 for letter in "abc"]
    files.write(path, texts[0])

    def write(text):
        try:
            for _ in range(20):
                files.write(path, text)
        except OSError as error:
            wrong.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_text() in texts
    assert wrong == []
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_beside_is_left_alone(tmp_path):
    (tmp_path / "file.tmp").write_text("somebody's")
    (tmp_path / "other").write_text("other")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    files.write(tmp_path / "file", b"new")
    assert (tmp_path / "file.tmp").read_text() == "somebody's"
    assert (tmp_path / "other").read_text() == "other"
    assert (tmp_path / "file").read_text() == "new"
    files.write(tmp_path / ("x" * 255), "as long as a name may be")


def test_permissions_are_those_of_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_an_error_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder", "none/file"):
        with pytest.raises(OSError, match=name) as caught:
            files.write(tmp_path / name, "text")
        assert caught.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
