"""Uploading what saves itself into a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any


def upload(save: Callable[..., None], repo_id: str, message: str, **kwargs: Any) -> str:
    """Let `save` write into a temporary folder, and upload that; returns the URL.

    Args:
        message: of the commit, if none is given.
        kwargs: as of transformers' `push_to_hub`; others than the Hub's go to `save`.
    """
    from huggingface_hub import HfApi

    private, token = kwargs.pop("private", None), kwargs.pop("token", None)
    message = kwargs.pop("commit_message", None) or message
    hub = {k: kwargs.pop(k) for k in ("commit_description", "revision", "create_pr") if k in kwargs}
    for ignored_by_hub in ("tags", "max_shard_size"):
        kwargs.pop(ignored_by_hub, None)
    api = HfApi(token=None if isinstance(token, bool) else token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, **kwargs)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message, **hub)
    return str(url)
