//! The documents, field by field, and the rules that only an explanation can show (F, Z, M, N10, X3).

mod explain;
mod plan;

use crate::model::Model;
use crate::object::{Service, Slice};
use crate::resolve::Policy;
use crate::resolve::tests::build::*;

/// Of one Service whose endpoints are `slices`.
fn model_of(service: Service, slices: Vec<Slice>) -> Model {
    model_with(Policy::default(), vec![service], slices)
}
