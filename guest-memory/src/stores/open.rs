//! From the specification to the stack of stores.

use std::sync::Arc;

use super::delay::Delay;
use super::fail::Fail;
use super::file::FileStore;
use super::memory::Memory;
use super::nbd::Nbd;
use super::same::Same;
use super::tiered::Tiered;
use super::{LayerSpec, Store, StoreError, StoreSpec};

/// Sets the store up, empty.
///
/// # Errors
/// [`StoreError::Open`] when a tier cannot be had; then nothing is left of the others.
pub fn open(spec: &StoreSpec) -> Result<Arc<dyn Store>, StoreError> {
    let mut stack: Option<Arc<dyn Store>> = None;
    for layer in spec.layers().iter().rev() {
        stack = Some(open_layer(layer, stack)?);
    }
    let stack = stack.expect("a specification has at least one layer");
    Ok(if spec.is_raw() { stack } else { Arc::new(Same::new(stack)) })
}

/// One layer over what is behind it. A specification has decorators in front of something.
fn open_layer(
    layer: &LayerSpec,
    behind: Option<Arc<dyn Store>>,
) -> Result<Arc<dyn Store>, StoreError> {
    let something = || behind.clone().expect("the last layer is no decorator");
    Ok(match layer {
        LayerSpec::Memory { size_bytes } => Arc::new(Memory::new(*size_bytes)?),
        LayerSpec::Delay(spec) => Arc::new(Delay::new(something(), *spec)),
        LayerSpec::Fail(spec) => Arc::new(Fail::new(something(), *spec)),
        LayerSpec::Lz4 { budget_bytes } => Arc::new(Tiered::new(*budget_bytes, behind)?),
        LayerSpec::File(spec) => Arc::new(FileStore::new(spec).map_err(super::OpenError::from)?),
        LayerSpec::Nbd(spec) => Arc::new(Nbd::new(spec).map_err(super::OpenError::from)?),
    })
}
