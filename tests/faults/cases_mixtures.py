"""Several data sets in one run, named wrongly or of files that do not go together."""

from faults.case import Case, flags, refused
from faults.damage import both, gone, pth
from faults.damage_tables import star, star_item

STAR = star([star_item(video_id="100000")])
BOTH = "--dataset nextqa,star"
CAPTIONS_OF_STAR = "toy/data/star/llava_v15_13b_n6.json"
FEATURES_OF_STAR = "toy/data/star/clipvitl14.pth"

MIXTURES: dict[str, Case] = {
    "a weight of 0": flags(
        "--dataset nextqa,star:0", "--dataset 'nextqa,star:0': the weight of 'star' is '0'; it must"
    ),
    "a negative weight": flags("--dataset star:-1", "the weight of 'star' is '-1'; it must be"),
    "a weight that is no number": flags("--dataset star:nan", "the weight of 'star' is 'nan'"),
    "a weight in words": flags("--dataset star:half", "the weight of 'star' is 'half'; it must be"),
    "a weight beyond all sense": flags("--dataset star:1e9", "above 0, and at most 1000"),
    "a data set twice": flags("--dataset nextqa,star,nextqa", "names 'nextqa' twice; give it a"),
    "a comma too many": flags("--dataset nextqa,", "holds an empty name; write NAME or"),
    "a weight without a name": flags("--dataset :2", "holds an empty name"),
    "a folder above the data": flags(
        "--dataset nextqa,../nextqa", "'../nextqa' is no plain name of a folder"
    ),
    "an unknown data set of two": flags(
        "--dataset nextqa,stra", "--dataset 'stra': there is no such data set", "mean 'star'?"
    ),
    "a data set that is not there": flags(BOTH, "data/star/STAR_train.json: "),
    "none of a data set": refused(
        STAR,
        "--dataset star:0.1: an epoch would hold none of its 1 training questions; raise the",
        line="--dataset nextqa,star:0.1",
    ),
    "a data set without captions": refused(
        both(STAR, gone(CAPTIONS_OF_STAR)),
        "data/star: holds no caption file (",
        "or train with --cap 0",
        line=BOTH,
    ),
    "captions of one data set for two": refused(
        STAR,
        "captions.json: must be NAME=PATH[,NAME=PATH], since there are several data sets",
        "NAME can be nextqa, star",
        line=f"{BOTH} --captions captions.json",
    ),
    "captions of a data set that is not there": refused(
        STAR,
        "none.json: no such file, and ",
        "star holds no none.json",
        line=f"{BOTH} --captions star=none.json",
    ),
    "features of the other data set": refused(
        both(STAR, pth(FEATURES_OF_STAR, lambda videos: videos.pop("100000") is None or videos)),
        "data/star/clipvitl14.pth: 1 of 1 questions (1 videos) have no features, e.g. '100000'",
        line=BOTH,
    ),
    "features of two widths": refused(
        both(STAR, pth(FEATURES_OF_STAR, lambda videos: {k: v[:, :5] for k, v in videos.items()})),
        "the data sets' features differ: nextqa: ",
        "clipvitl14.pth, 5 wide; one model reads",
        line=BOTH,
    ),
    "a bad row of the second data set": refused(
        star([star_item(answer="nothing")]), "STAR_val.json[0]: 'answer' is 'nothing'", line=BOTH
    ),
    "subtitles of two without": refused(
        STAR, "--sub: only TVQA has subtitles, and --dataset is nextqa,star", line=f"{BOTH} --sub"
    ),
    "another mixture than the checkpoint's": refused(
        STAR,
        "was written by a run with other settings or files (dataset, data; table below)",
        line=f"{BOTH} --resume {{fixture}}/run/checkpoint-1",
    ),
}
