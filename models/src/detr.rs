//! A DETR whose queries are classified before they are decoded: CORA's localizer. Wu et al., CVPR 2023, <https://arxiv.org/abs/2303.13076>.

pub mod prematch;
pub mod scores;
