//! libibverbs and librdmacm, loaded on demand: the program starts without them.
//!
//! Only exported functions are listed. Inline functions of the headers (posting, polling) use the
//! device's function table and need no symbol.

use std::{
    error::Error as _,
    ffi::{c_char, c_int, c_uint, c_void},
    io,
    ptr::NonNull,
    sync::OnceLock,
};

use libc::sockaddr;
use rdma_sys::{
    _compat_ibv_port_attr, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr,
    ibv_mr, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, rdma_cm_event, rdma_cm_id,
    rdma_conn_param, rdma_event_channel, rdma_port_space,
};

use crate::fabric::{FabricError, Result};

/// Load a library and never unload it: its functions must stay valid.
fn open(name: &str) -> std::result::Result<&'static libloading::Library, libloading::Error> {
    // SAFETY: the initialisers of rdma-core's libraries have no preconditions.
    let library = unsafe { libloading::Library::new(name)? };
    Ok(Box::leak(Box::new(library)))
}

macro_rules! library {
    ($($file:literal { $(fn $name:ident($($argument:ty),*) -> $result:ty;)* })*) => {
        /// Function pointers, under the functions' names.
        pub(super) struct Library {
            $($(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*)*
        }

        impl Library {
            fn load() -> std::result::Result<Self, libloading::Error> {
                $(
                    let library = open($file)?;
                    $(
                        // SAFETY: rdma-core's headers declare the function with this type.
                        let $name = unsafe {
                            *library.get::<unsafe extern "C" fn($($argument),*) -> $result>(
                                stringify!($name).as_bytes(),
                            )?
                        };
                    )*
                )*
                Ok(Self { $($($name,)*)* })
            }
        }
    };
}

library! {
    "libibverbs.so.1" {
        fn ibv_get_device_list(*mut c_int) -> *mut *mut ibv_device;
        fn ibv_free_device_list(*mut *mut ibv_device) -> ();
        fn ibv_get_device_name(*mut ibv_device) -> *const c_char;
        fn ibv_open_device(*mut ibv_device) -> *mut ibv_context;
        fn ibv_close_device(*mut ibv_context) -> c_int;
        fn ibv_query_device(*mut ibv_context, *mut ibv_device_attr) -> c_int;
        fn ibv_query_port(*mut ibv_context, u8, *mut _compat_ibv_port_attr) -> c_int;
        fn ibv_alloc_pd(*mut ibv_context) -> *mut ibv_pd;
        fn ibv_dealloc_pd(*mut ibv_pd) -> c_int;
        fn ibv_reg_mr(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
        fn ibv_dereg_mr(*mut ibv_mr) -> c_int;
        fn ibv_create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
        fn ibv_destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
        fn ibv_create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
        fn ibv_destroy_cq(*mut ibv_cq) -> c_int;
        fn ibv_get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
        fn ibv_modify_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
        fn ibv_ack_cq_events(*mut ibv_cq, c_uint) -> ();
    }
    "librdmacm.so.1" {
        fn rdma_create_event_channel() -> *mut rdma_event_channel;
        fn rdma_destroy_event_channel(*mut rdma_event_channel) -> ();
        fn rdma_create_id(*mut rdma_event_channel, *mut *mut rdma_cm_id, *mut c_void, rdma_port_space::Type) -> c_int;
        fn rdma_destroy_id(*mut rdma_cm_id) -> c_int;
        fn rdma_migrate_id(*mut rdma_cm_id, *mut rdma_event_channel) -> c_int;
        fn rdma_bind_addr(*mut rdma_cm_id, *mut sockaddr) -> c_int;
        fn rdma_resolve_addr(*mut rdma_cm_id, *mut sockaddr, *mut sockaddr, c_int) -> c_int;
        fn rdma_resolve_route(*mut rdma_cm_id, c_int) -> c_int;
        fn rdma_create_qp(*mut rdma_cm_id, *mut ibv_pd, *mut ibv_qp_init_attr) -> c_int;
        fn rdma_destroy_qp(*mut rdma_cm_id) -> ();
        fn rdma_connect(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        fn rdma_listen(*mut rdma_cm_id, c_int) -> c_int;
        fn rdma_accept(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        fn rdma_reject(*mut rdma_cm_id, *const c_void, u8) -> c_int;
        fn rdma_disconnect(*mut rdma_cm_id) -> c_int;
        fn rdma_get_cm_event(*mut rdma_event_channel, *mut *mut rdma_cm_event) -> c_int;
        fn rdma_ack_cm_event(*mut rdma_cm_event) -> c_int;
        fn rdma_set_option(*mut rdma_cm_id, c_int, c_int, *mut c_void, usize) -> c_int;
        fn rdma_get_src_port(*mut rdma_cm_id) -> u16;
    }
}

impl Library {
    /// Load the libraries of this host, once.
    ///
    /// # Errors
    /// [`FabricError::Unavailable`] if one is missing or too old.
    pub(super) fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| Self::load().map_err(|error| said(&error)));
        loaded.as_ref().map_err(|why| {
            FabricError::Unavailable(format!(
                "{why}; install rdma-core's libraries (libibverbs1, librdmacm1, ibverbs-providers)"
            ))
        })
    }
}

/// The dynamic linker's message, which names the library.
fn said(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// The result of a function that returns -1 and sets errno.
pub(super) fn check(call: &'static str, result: c_int) -> Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(FabricError::Host { call, source: io::Error::last_os_error() })
    }
}

/// The result of a function that returns an object, or NULL and sets errno.
pub(super) fn created<T>(call: &'static str, raw: *mut T) -> Result<NonNull<T>> {
    NonNull::new(raw).ok_or_else(|| FabricError::Host { call, source: io::Error::last_os_error() })
}

/// Map an error of object creation to [`FabricError::Refused`].
pub(super) fn refused(what: impl FnOnce() -> String) -> impl FnOnce(FabricError) -> FabricError {
    |error| match error {
        FabricError::Host { source, .. } => FabricError::Refused { what: what(), source },
        other => other,
    }
}

/// The result of a function that returns an errno.
pub(super) fn check_errno(call: &'static str, errno: c_int) -> Result<()> {
    if errno == 0 {
        Ok(())
    } else {
        Err(FabricError::Host { call, source: io::Error::from_raw_os_error(errno.abs()) })
    }
}
