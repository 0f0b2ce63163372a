"""Words by which texts name planes, modalities, body parts, organs and targets (Med3DInsight, Table I)."""

import re
from collections.abc import Mapping

PLANES = {"axial": "axial|transverse|transaxial", "coronal": "coronal", "sagittal": "sagittal"}

MODALITIES = {
    "MRI": r"mri?s?|magnetic resonance|t[12]-?(?: ?weighted|w)|flair|dwi|adc|swi",
    "CT": r"cta?|computed tomograph\w+",
    "PET": r"pet|positron emission \w+",
    "Ultrasound": r"ultrasounds?|ultrasonograph\w+|sonogra\w+",
}
"""As texts write them."""
CHANNELS = {**MODALITIES, "MRI": rf"{MODALITIES['MRI']}|t[12]\w*|pd|gre|tof"}
"""As channels are called; in a text, T1 may be a vertebra."""

BODY_PARTS = {
    "Head": r"head|skull|crani\w+|brain|cerebr\w+|intracranial|hippocamp\w+",
    "Neck": r"neck|cervical|thyroid",
    "Chest": r"chest|thora\w+|lungs?|pulmonary|heart|cardiac|mediastin\w+|breasts?",
    "Abdomen": r"abdom\w+|liver|hepatic|spleen|splenic|kidneys?|renal|stomach|pancrea\w+|bowel|adrenal",
    "Pelvis": r"pelvi[sc]|bladder|prostate|uterus|rectum|rectal|hips?",
    "Limbs": r"limbs?|arms?|legs?|knees?|thighs?|shoulders?|femur|tibia|humerus|calf",
}
ORGANS = {
    "Brain": r"brain|cerebr\w+|ventricular system|hippocamp\w+",
    "Heart": r"heart|cardiac|atri\w+|myocardi\w+",
    "Lung": r"lungs?|pulmonary",
    "Liver": r"liver|hepatic",
    "Stomach": r"stomach|gastric",
    "Vessel": r"vessels?|arter\w+|veins?|aorta|vascular",
    "Spleen": r"spleen|splenic",
    "Vertebral": r"vertebra\w*|spine|spinal",
    "Kidney": r"kidneys?|renal",
}
TARGETS = {
    "Tissue": r"tissues?",
    "Organ": "organs?|" + "|".join(ORGANS.values()),
    "Tumor": r"tumou?rs?|cancer\w*|carcinoma\w*|sarcoma\w*|metasta\w+|neoplasms?|malignan\w+|glioma\w*",
    "Lesion": r"lesions?|nodules?|cysts?|mass(?:es)?",
}


def named(text: str, words: Mapping[str, str]) -> set[str]:
    """Which entries of a category a text names."""
    return {name for name, pattern in words.items() if re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE)}
