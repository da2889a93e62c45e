"""IntentQA: NExT-QA's CSV with `video_id` and columns of its own; its questions are NExT-QA's, its groups are not."""

from vico.data.readers import nextqa

GROUPS = {"CW": "CW", "CH": "CH", "TP": "TP&TN", "TN": "TP&TN"}

file_of, read = nextqa.file_of, nextqa.read
