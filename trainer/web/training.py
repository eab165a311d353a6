import streamlit as st
def show(labels):
    st.write("later")
