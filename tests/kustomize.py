"""Rendering of kustomizations without kustomize, in so far as `deploy/kubernetes` uses it.

That are resources, components, one namespace, new names of images, and strategic merge patches in files. A test
compares the result with kustomize's own where that program is installed (alone, or in kubectl).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

# Key by which the items of a list are merged, by the list's name. Other lists are replaced.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
}
_FIELDS = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches"}
_NO_NAMESPACE = {"Namespace"}


def render(folder: Path) -> list[Manifest]:
    """The manifests that `kustomize build` makes of a folder.

    Raises:
        NotImplementedError: its kustomization has a field that is not rendered here.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    manifests = [manifest for name in kustomization.get("resources", []) for manifest in _resources(folder / name)]
    for name in kustomization.get("components", []):
        component = folder / name
        manifests = _transformed(manifests + list(_own(component)), component)
    return _transformed(manifests, folder)


def _resources(path: Path) -> list[Manifest]:
    if path.is_dir():
        return render(path)
    return [manifest for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")) if manifest]


def _own(component: Path) -> Iterator[Manifest]:
    content = yaml.safe_load((component / "kustomization.yaml").read_text(encoding="utf-8"))
    for name in content.get("resources", []):
        yield from _resources(component / name)


def _transformed(manifests: list[Manifest], folder: Path) -> list[Manifest]:
    """The manifests with the patches, the images and the namespace of a folder's kustomization."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := content.keys() - _FIELDS:
        raise NotImplementedError(f"{folder.name}: {', '.join(sorted(unknown))}")
    for entry in content.get("patches", []):
        (patch,) = _resources(folder / entry["path"])
        (patched,) = (manifest for manifest in manifests if identity(manifest) == identity(patch))
        manifests[manifests.index(patched)] = merged(patched, patch)
    for manifest in manifests:
        if "namespace" in content and manifest["kind"] not in _NO_NAMESPACE:
            manifest["metadata"]["namespace"] = content["namespace"]
        for container in containers(manifest):
            name, _, tag = container["image"].partition(":")
            for image in content.get("images", []):
                if image["name"] == name:
                    container["image"] = f"{image['newName']}:{tag}"
    return manifests


def identity(manifest: Manifest) -> tuple[str, str]:
    """Kind and name of a manifest."""
    return manifest["kind"], manifest["metadata"]["name"]


def containers(manifest: Manifest) -> list[Manifest]:
    """All containers of a Deployment, those that run before the others first; none of other kinds."""
    if manifest["kind"] != "Deployment":
        return []
    pod = manifest["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def merged(base: Manifest, patch: Manifest) -> Manifest:
    """The base with a strategic merge patch: null removes a field, `$patch: delete` an item of a list."""
    result = deepcopy(base)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            result[name] = merged(result.get(name) or {}, value)
        elif name in _MERGE_KEYS and name in result:
            result[name] = _merged_items(result[name], value, _MERGE_KEYS[name])
        else:
            result[name] = deepcopy(value)
    return result


def _merged_items(base: list[Manifest], patch: list[Manifest], key: str) -> list[Manifest]:
    items = {item[key]: item for item in base}
    for change in patch:
        if change.get("$patch") == "delete":
            del items[change[key]]
        else:
            items[change[key]] = merged(items.get(change[key], {}), change)
    return list(items.values())
