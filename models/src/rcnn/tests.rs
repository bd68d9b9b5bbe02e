//! Two-stage detectors against torchvision, by weights and inputs that both sides compute from one formula.

mod detectors;
mod detpro;
mod distillation;
mod networks;
mod oln;
