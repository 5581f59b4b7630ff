//! Lookahead (Zhang, Lucas, Hinton & Ba, 2019), <https://arxiv.org/abs/1907.08610>: an inner optimizer's step and the
//! sync of slow and fast weights, in one pass over memory.
//!
//! A rule is one text ([`rule`]) in one file (`rules/`), listed in the registry ([`rules`]). The [`kernel`] runs it over
//! tiles at the best instruction set ([`simd`]); [`step`] adds what is rarer than a sync, and [`lookahead`] counts cycles.
//! [`gradient`] scales and clips, [`reduce`] adds up; [`parts`] are what [`threads`] share. [`element`] knows number formats,
//! [`codec`] state in fewer bits, [`array`](mod@array) both as tiles, [`leaf`] and [`layout`] where an array keeps its
//! numbers; [`wgsl`] writes the same rule as a compute shader. `py` is the only place that knows Python.

pub mod array;
pub mod codec;
pub mod element;
pub mod error;
pub mod gradient;
pub mod kernel;
pub mod layout;
pub mod leaf;
pub mod lookahead;
pub mod parts;
#[cfg(feature = "python")]
mod py;
pub mod reduce;
pub mod rule;
pub mod rules;
pub mod simd;
pub mod step;
pub mod threads;
pub mod wgsl;
