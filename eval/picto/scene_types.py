"""Kinds of places in Picto's world, their typical objects and colours, and COCO's categories with their ids."""

from __future__ import annotations

from dataclasses import dataclass

from . import sprites

CATEGORIES = tuple(sprites.EMOJI)  #: the 64 COCO categories that occur, in COCO's order

# fmt: off
#: All 80 COCO categories and their ids.
COCO_IDS: dict[str, int] = dict(zip((
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush"), (
    *range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)),
    strict=True))


@dataclass(frozen=True)
class SceneType:
    """What a kind of place looks like and what is typically in it (core objects four times as often as the rest)."""
    core: tuple[str, ...]
    rest: tuple[str, ...]
    sky: tuple[int, int, int]      # RGB above the horizon
    ground: tuple[int, int, int]   # RGB below it
    texture: str                   # of the ground

    @property
    def typical(self) -> tuple[str, ...]:
        return self.core + self.rest


SCENE_TYPES: dict[str, SceneType] = {
    "kitchen": SceneType(("cup", "bowl", "knife", "spoon"),
                         ("bottle", "banana", "apple", "carrot", "broccoli", "orange", "clock", "sandwich"),
                         (240, 226, 196), (190, 150, 110), "tiles"),
    "restaurant": SceneType(("pizza", "wine glass", "cake", "person"),
                            ("donut", "cup", "sandwich", "hot dog", "bottle", "spoon", "handbag", "chair"),
                            (150, 70, 60), (110, 60, 45), "planks"),
    "living room": SceneType(("couch", "tv", "potted plant", "book"),
                             ("cat", "vase", "clock", "chair", "dog", "laptop", "person"),
                             (205, 220, 205), (165, 120, 80), "planks"),
    "bedroom": SceneType(("bed", "teddy bear", "clock", "book"),
                         ("laptop", "cell phone", "cat", "chair", "suitcase", "potted plant"),
                         (205, 195, 235), (150, 130, 175), "noise"),
    "bathroom": SceneType(("toilet", "toothbrush", "vase", "scissors"),
                          ("cup", "bottle", "potted plant", "cell phone", "person"),
                          (200, 235, 240), (120, 180, 190), "tiles"),
    "office": SceneType(("laptop", "keyboard", "mouse", "tie"),
                        ("cell phone", "chair", "cup", "book", "scissors", "clock", "potted plant", "person"),
                        (225, 228, 232), (130, 140, 155), "noise"),
    "street": SceneType(("car", "traffic light", "bus", "person"),
                        ("truck", "motorcycle", "bicycle", "stop sign", "dog", "handbag", "train"),
                        (170, 190, 215), (95, 95, 100), "stripes"),
    "airport": SceneType(("airplane", "suitcase", "person", "backpack"),
                         ("truck", "bus", "handbag", "tie", "train", "cell phone"),
                         (150, 205, 245), (155, 160, 165), "stripes"),
    "beach": SceneType(("umbrella", "boat", "kite", "person"),
                       ("frisbee", "bird", "sports ball", "dog", "bottle", "handbag"),
                       (90, 185, 235), (240, 220, 160), "noise"),
    "park": SceneType(("bicycle", "dog", "bird", "skateboard"),
                      ("frisbee", "kite", "person", "sports ball", "hot dog", "backpack", "book"),
                      (175, 225, 250), (110, 180, 85), "noise"),
    "farm": SceneType(("cow", "sheep", "horse", "dog"),
                      ("truck", "apple", "carrot", "bird", "cat", "person"),
                      (200, 230, 245), (150, 160, 70), "stripes"),
    "savanna": SceneType(("elephant", "zebra", "giraffe", "bird"),
                         ("bear", "car", "person", "backpack", "horse"),
                         (250, 205, 130), (205, 170, 90), "noise"),
    "mountain": SceneType(("skis", "bear", "person", "backpack"),
                          ("dog", "bird", "bottle", "sandwich", "cup"),
                          (140, 175, 225), (235, 240, 250), "noise"),
    "sports field": SceneType(("sports ball", "tennis racket", "person", "bottle"),
                              ("backpack", "frisbee", "bicycle", "kite", "banana", "cell phone"),
                              (120, 150, 120), (60, 140, 70), "stripes"),
    "market": SceneType(("banana", "apple", "orange", "carrot"),
                        ("broccoli", "person", "handbag", "bicycle", "vase", "donut", "umbrella"),
                        (235, 190, 130), (170, 165, 150), "tiles"),
}
# fmt: on
