"""Files that are complete or absent: everything is staged under another name, flushed, and renamed into place."""

from qlora_kit.storage.checksums import changed_files, checksums, read_checksums, sha256_file
from qlora_kit.storage.files import SCHEMA, json_text, name_file, read_json, write_json, write_tensors, write_text
from qlora_kit.storage.folders import check_folder, make_folder, passing_folder, remove_folder, staged_folder
from qlora_kit.storage.hidden import clear_abandoned, staged_for
from qlora_kit.storage.room import check_room, check_writable, drop_least_used, private_folder

__all__ = [
    "SCHEMA",
    "changed_files",
    "check_folder",
    "check_room",
    "check_writable",
    "checksums",
    "clear_abandoned",
    "drop_least_used",
    "json_text",
    "make_folder",
    "name_file",
    "passing_folder",
    "private_folder",
    "read_checksums",
    "read_json",
    "remove_folder",
    "sha256_file",
    "staged_folder",
    "staged_for",
    "write_json",
    "write_tensors",
    "write_text",
]
