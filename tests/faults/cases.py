"""All cases of corrupted inputs."""

from faults.case import Case
from faults.cases_ask import ASKED
from faults.cases_checkpoints import CHECKPOINTS
from faults.cases_containers import CONTAINERS
from faults.cases_deepspeed import DEEPSPEED
from faults.cases_export import EXPORTS
from faults.cases_features import FEATURE_FILES
from faults.cases_formats import FORMATS
from faults.cases_hugging_face import HUGGING_FACE
from faults.cases_llama import LLAMA
from faults.cases_mixtures import MIXTURES
from faults.cases_output_dir import OUTPUT_DIR
from faults.cases_published import PUBLISHED_FILES
from faults.cases_report import REPORTS
from faults.cases_schema import SCHEMA
from faults.cases_settings import SETTINGS
from faults.cases_tables import TABLES
from faults.cases_videos import VIDEOS

CASES: dict[str, Case] = {
    **SETTINGS,
    **DEEPSPEED,
    **OUTPUT_DIR,
    **TABLES,
    **SCHEMA,
    **FORMATS,
    **MIXTURES,
    **FEATURE_FILES,
    **CONTAINERS,
    **LLAMA,
    **HUGGING_FACE,
    **CHECKPOINTS,
    **PUBLISHED_FILES,
    **EXPORTS,
    **ASKED,
    **REPORTS,
    **VIDEOS,
}
